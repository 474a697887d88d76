"""From the URL of a root to an opened store.

Knows URLs, endpoints and retries. Does not know what a root holds.
"""

import os
import pathlib
import urllib.parse

import tensorstore as ts

from cachedattn_jax.store.objects.folder_kv import FolderKv
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.object_kv import ObjectKv


def local_folder(url: str) -> pathlib.Path | None:
    """The folder that a path or a file:// URL names; None for anything else."""
    if url.startswith("file://"):
        return pathlib.Path(urllib.parse.unquote(urllib.parse.urlparse(url).path))
    if "://" in url:
        return None
    return pathlib.Path(url).expanduser().absolute()


def open_kv(url: str, io: IoConfig, is_writing: bool) -> FolderKv | ObjectKv:
    """Opens a path, or a TensorStore URL such as file://, s3://, gs:// or memory://.

    Raises:
        ValueError: it cannot be opened.
    """
    retries = {
        "max_retries": io.max_retries,
        "initial_delay": "50ms",
        "max_delay": "1s",
    }
    context = ts.Context(
        {
            "file_io_sync": io.is_synced,
            "file_io_concurrency": {"limit": 16},
            "s3_request_retries": retries,
            "gcs_request_retries": retries,
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    folder = local_folder(url)
    if folder is not None:
        _check_folder(url, folder, is_writing)
        spec: object = {"driver": "file", "path": f"{folder}/"}
    elif url.startswith("s3://"):
        spec = _s3_spec(url, io)
    else:
        spec = url if url.endswith("/") else url + "/"
    try:
        kv = ObjectKv(ts.KvStore.open(spec, context=context).result(io.timeout_s))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"disk_root={url!r} cannot be opened: {first_line(error)}"
        ) from error
    return kv if folder is None else FolderKv(kv, folder, io.is_synced)


def first_line(error: BaseException) -> str:
    """What a person has to read of an error of TensorStore."""
    return str(error).strip().splitlines()[0].split(" [")[0]


def _check_folder(url: str, folder: pathlib.Path, is_writing: bool) -> None:
    if not is_writing:
        if not folder.is_dir():
            raise ValueError(f"{url!r} holds no store: there is no such folder")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"disk_root={url!r} cannot be used: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"disk_root={url!r} cannot be used: it is not writable")


def _s3_spec(url: str, io: IoConfig) -> dict[str, object]:
    """TensorStore takes no endpoint from the environment, which AWS's own tools do."""
    parsed = urllib.parse.urlparse(url)
    path = parsed.path.strip("/")
    environ = os.environ
    endpoint = (
        io.s3_endpoint
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
    )
    region = io.s3_region or environ.get("AWS_REGION")
    region = region or environ.get("AWS_DEFAULT_REGION")
    spec: dict[str, object] = {"driver": "s3", "bucket": parsed.netloc}
    spec["path"] = f"{path}/" if path else ""
    if endpoint:
        spec["endpoint"] = endpoint
    if endpoint or region:
        spec["aws_region"] = region or "us-east-1"
    return spec
