#!/usr/bin/env bash
# Be an S3 server: Ceph's gateway on https, over one monitor and one object store.
#
# LAB_S3        folder with certificate.pem and key.pem (see secrets.sh); keeps the objects
# LAB_S3_GB     size of the store, whose file grows as it fills
# AWS_SHARED_CREDENTIALS_FILE
#               the keys that the server accepts
set -euo pipefail
umask 077
cd "$LAB_S3"
export CEPH_CONF=$LAB_S3/ceph.conf
fsid=5d3f9f3c-6a0e-4a64-8f2f-3b7f0f1d2c11 # of a cluster that nobody else talks to
monitor='[v2:127.0.0.1:3300]'

cat > "$CEPH_CONF" << END
[global]
fsid = $fsid
mon host = $monitor
ms bind msgr1 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = $LAB_S3/keyring
mon data = $LAB_S3/mon
osd data = $LAB_S3/osd
rgw data = $LAB_S3
run dir = $LAB_S3
crash dir = $LAB_S3
log file =
log to stderr = false
mon cluster log file =
admin socket =
osd objectstore = bluestore
bluestore block size = $((LAB_S3_GB << 30))
osd memory target = 939524096
# One copy, one placement group, no waiting for votes.
osd pool default size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
paxos propose interval = 0.05
paxos min wait = 0.01
# Without tcp_nodelay each answer waits 40 ms for an acknowledgement.
rgw frontends = beast ssl_endpoint=0.0.0.0:9000 ssl_certificate=$LAB_S3/certificate.pem ssl_private_key=$LAB_S3/key.pem tcp_nodelay=1
rgw override bucket index max shards = 1
END

# The one that ends takes the others along; the store is told to, so that its disk is in order.
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT
trap 'exit 143' TERM INT

if [ ! -f made ]; then
    rm -rf keyring mon osd # of a first start that was cut off
    key=$(ceph-authtool --gen-print-key)
    printf '[%s]\nkey = '"$key"'\ncaps mon = "allow *"\ncaps osd = "allow *"\n' \
        mon. client.admin osd.0 > keyring
    monmaptool --create --clobber --fsid "$fsid" --addv a "$monitor" monmap > /dev/null
    ceph-mon --mkfs -i a --monmap monmap
fi
ceph-mon -f -i a &
if [ ! -f made ]; then
    mkdir osd
    ceph osd new "$fsid" > /dev/null
    ceph-osd --mkfs -i 0 --osd-uuid "$fsid"
fi
ceph-osd -f -i 0 &
if [ ! -f made ]; then
    ini() { sed -n "s/^$1 *= *//p" "$AWS_SHARED_CREDENTIALS_FILE"; }
    radosgw-admin user create --uid=lab --display-name=lab \
        --access-key="$(ini aws_access_key_id)" --secret="$(ini aws_secret_access_key)" > /dev/null
    touch made
fi
radosgw -f -n client.admin &
wait -n
