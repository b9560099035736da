#!/usr/bin/env bash
# Be MLflow's database: PostgreSQL over TLS, with one user who may log in over the network.
#
# LAB_POSTGRES  folder with certificate.pem, key.pem and password (see secrets.sh); keeps the data
set -euo pipefail
shopt -s nullglob
binaries=(/usr/lib/postgresql/*/bin)
PATH=${binaries[-1]:?PostgreSQL is missing; fix: apt-get install postgresql}:$PATH
data=$LAB_POSTGRES/data

if [ ! -d "$data" ]; then
    rm -rf "$data.new" # of a start that was cut off
    initdb --username=postgres --auth=reject --encoding=UTF8 --no-instructions -D "$data.new" > /dev/null
    echo 'hostssl mlflow mlflow all scram-sha-256' > "$data.new/pg_hba.conf"
    postgres --single -D "$data.new" postgres > /dev/null << END
CREATE ROLE mlflow LOGIN PASSWORD '$(cat "$LAB_POSTGRES/password")'
CREATE DATABASE mlflow OWNER mlflow
END
    mv "$data.new" "$data"
fi
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories= \
    -c ssl=on -c ssl_cert_file="$LAB_POSTGRES/certificate.pem" -c ssl_key_file="$LAB_POSTGRES/key.pem"
