#!/usr/bin/env bash
# Make the lab's certificates and passwords. They are made once: a second start finds the same.
#
# LAB_TRUST     folder for ca.pem, by which clients check the servers
# LAB_ACCESS    folder for s3.ini, the keys to S3 (for AWS_SHARED_CREDENTIALS_FILE)
# LAB_POSTGRES, LAB_MLFLOW, LAB_S3
#               each server's own folder, for certificate.pem, key.pem and its passwords
set -euo pipefail
umask 077
[ ! -f "$LAB_TRUST/ca.pem" ] || exit 0

# certify NAME OPTION... makes key.pem and certificate.pem in the current folder.
certify() {
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl req -x509 -config /dev/null -key key.pem -out certificate.pem -days 3650 \
        -subj "/CN=$1" "${@:2}"
}

# The authority's key goes with this folder: nobody can sign another certificate.
authority=$(mktemp -d)
trap 'rm -rf "$authority"' EXIT
cd "$authority"
certify 'dtr_scale lab' \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
for server in "postgres=$LAB_POSTGRES" "mlflow=$LAB_MLFLOW" "s3=$LAB_S3"; do
    name=${server%%=*}
    cd "${server#*=}"
    certify "$name" -CA "$authority/certificate.pem" -CAkey "$authority/key.pem" \
        -addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage=serverAuth \
        -addext "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1"
done

password=$(openssl rand -hex 24)
echo "$password" > "$LAB_POSTGRES/password"
echo "*:*:*:mlflow:$password" > "$LAB_MLFLOW/pgpass"
cat > "$LAB_ACCESS/s3.ini" << END
[default]
aws_access_key_id = $(openssl rand -hex 10)
aws_secret_access_key = $(openssl rand -hex 20)
END

# Last and at once, since it tells that all the rest is there.
install -m 644 "$authority/certificate.pem" "$LAB_TRUST/ca.pem.new"
mv "$LAB_TRUST/ca.pem.new" "$LAB_TRUST/ca.pem"
echo "made certificates and passwords"
