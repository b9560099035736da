#!/usr/bin/env bash
# Make the bucket $LAB_BUCKET, and prepare the digits into it. What is there already stays.
#
# The AWS_* variables say where S3 is and how its certificate is checked.
set -euo pipefail
python - << 'END'
import os
from botocore.session import Session

Session().create_client("s3").create_bucket(Bucket=os.environ["LAB_BUCKET"])
END
exec dtr-scale prepare digits --out "s3://$LAB_BUCKET/digits/"
