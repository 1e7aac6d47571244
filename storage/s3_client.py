"""The client of a bucket's service, and what its errors mean: one line with the bucket, the host and the remedy.

boto3 is imported when a bucket is used, not before.
"""

from __future__ import annotations

import functools
import os
from typing import Any
from urllib.parse import urlsplit

from storage.errors import Kind
from storage.store import LakeError

ATTEMPTS = 8
"""Tries of one request, with growing and random pauses between them, where AWS_MAX_ATTEMPTS does not say otherwise."""


class BucketError(LakeError):
    """A bucket cannot be used: it is not there, is out of reach, or refuses. The message names it and the remedy."""

    kind = Kind.ENVIRONMENT


class Absent(BucketError):
    """Nothing is stored under the key."""


class NoRange(BucketError):
    """The object ends before the range begins."""


class Condition(BucketError):
    """A put's condition does not hold; `raced`: another put was under way, so that it is not known yet."""

    def __init__(self, raced: bool) -> None:
        super().__init__("another program puts the same object")
        self.raced = raced


def client(endpoint: str | None, attempts: int = ATTEMPTS) -> Any:
    """The client of this process. It is made once: that takes longer than a request."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _made_client(endpoint, attempts, os.getpid(), settings)


@functools.lru_cache(maxsize=16)
def _made_client(endpoint: str | None, attempts: int, process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise BucketError("s3:// needs the extra `s3`, which is not installed; run: pip install 'vlfm[s3]'") from None
    chosen = dict(settings)
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 16}
    asked = chosen.get("AWS_MAX_ATTEMPTS", "")
    tries = min(attempts, int(asked)) if asked.isdigit() and int(asked) else attempts
    config["retries"] = {"mode": chosen.get("AWS_RETRY_MODE", "standard"), "total_max_attempts": tries}
    if chosen.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"):
        config["signature_version"] = UNSIGNED  # public buckets
    session = boto3.session.Session()
    if endpoint is not None and path_style(endpoint):
        config["s3"] = {"addressing_style": "path"}
    region = session.region_name or (None if endpoint is None else "us-east-1")
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=Config(**config))


def path_style(endpoint: str) -> bool:
    """Whether a service is asked for `host/bucket`: all but AWS, whose hosts are `bucket.host`."""
    return not (urlsplit(endpoint).hostname or "").endswith(("amazonaws.com", "amazonaws.com.cn"))


def host(endpoint: str | None) -> str:
    return urlsplit(endpoint).netloc if endpoint is not None else "AWS S3"


def told(error: Exception, bucket: str, endpoint: str | None, is_object: bool) -> Exception | None:
    """What an error of the client means; None where it is not the client's."""
    from botocore import exceptions as boto
    from botocore.exceptions import ClientError

    at = f"bucket {bucket!r} ({host(endpoint)})"
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket" or (status == 404 and not is_object):
            return BucketError(f"{at} does not exist; create it, or correct its name or AWS_ENDPOINT_URL")
        if status == 404:
            return Absent()
        if status == 416:
            return NoRange()
        if status in (409, 412):
            return Condition(raced=status == 409)
        if status == 501:
            return LakeError(f"{at} does not know conditional writes; use a server that has them")
        if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            where = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
            region = f"region {where}" if where else "another region"
            return BucketError(f"{at} is in {region}; set AWS_REGION to the bucket's region")
        if status in (401, 403) or "Token" in code or "Signature" in code:
            return BucketError(
                f"{at} refuses these credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE, and that they may read, list and write there"
            )
        if status == 400 and not is_object:
            # What a HEAD answers has no body that would say more.
            return BucketError(f"{at} refuses the request (400); check AWS_REGION and the credentials")
        return BucketError(f"{at} answered {status} {code} to the last of the tries; run the same command again later")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return BucketError(
            f"no credentials for {at}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
            "(AWS_NO_SIGN_REQUEST=yes for a public bucket)"
        )
    if isinstance(error, boto.ProfileNotFound):
        return BucketError(f"{error}; correct AWS_PROFILE")
    if isinstance(error, boto.NoRegionError | boto.InvalidRegionError):
        return BucketError(f"no usable region for {at}; set AWS_REGION to the bucket's region")
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
        return BucketError(f"{at} cannot be reached; check AWS_ENDPOINT_URL and the network")
    if isinstance(error, boto.SSLError):
        return BucketError(
            f"{at}: no secure connection ({_first_line(error)}); check AWS_ENDPOINT_URL and AWS_CA_BUNDLE"
        )
    if isinstance(error, boto.ParamValidationError):
        return BucketError(f"{at}: {_first_line(error)}; correct the name of the bucket")
    if isinstance(error, boto.HTTPClientError | boto.ConnectionClosedError | boto.ReadTimeoutError):
        return BucketError(f"{at} does not answer ({type(error).__name__}); run the same command again later")
    if isinstance(error, ValueError) and "endpoint" in str(error):
        return BucketError(f"AWS_ENDPOINT_URL {endpoint!r} is no URL; give http(s)://HOST[:PORT]")
    return None


def _first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
