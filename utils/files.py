"""Where files lie and how they are written: paths from the repository's root, results that appear whole or not."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME_BYTES = 200


def from_root(path: str | Path) -> Path:
    """Makes a path absolute, counting relative ones from the repository's root, so that any working directory does."""
    return ROOT / Path(path).expanduser()


def shown(path: str | Path) -> str:
    """A path for messages: relative to the repository's root where it lies inside it.

    Bytes that are no UTF-8 are written as \\xff, since they can be neither printed nor stored in JSON.
    """
    path = Path(path)
    return os.fsencode(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).decode(errors="backslashreplace")


def public_name(path: Path) -> str:
    """A folder's name for a published file: no path of this machine."""
    return shown(path) if path.is_relative_to(ROOT) else path.name


def missing_model(model_dir: Path, model_name: str) -> str:
    """The error message for a missing model folder."""
    near = sorted(str(path.parent.relative_to(model_dir)) for path in model_dir.glob("*/*/config.json"))
    there = f" There are: {', '.join(near)}." if near else ""
    return (
        f"No model at {shown(model_dir / model_name)} (expected a folder with config.json and weights).{there}\n"
        f"Fetch it with: python download_pt.py --model {model_name}"
    )


def write_problem(folder: Path) -> str:
    """Says why no files can be written into a folder, which need not exist yet; "" if they can."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return ""
    why = f"you may not write into {shown(nearest)}" if nearest.is_dir() else f"{shown(nearest)} is none"
    return f"{shown(folder)} is no folder that can be written to ({why}). Name another."


def check_target(flag: str, target: Path) -> None:
    """Makes sure that a new model's folder has a name, and that nothing is replaced but one that was written here.

    Args:
        flag: The argument that named it.
        target: The folder.

    Raises:
        SystemExit: naming what is in the way.
    """
    # Line breaks and other control characters, and bytes that are no UTF-8; file systems take 255 bytes, some of which
    # are for the endings of what is written beside it.
    too_long = any(len(os.fsencode(part)) > LONGEST_NAME_BYTES for part in target.parts)
    if too_long or not target.name.isprintable():
        raise SystemExit(f"{flag}: got {target.name[:300]!r}, expected a name such as BiliComments.")
    for folder in target.parents:
        if all((folder / file).is_file() for file in ("run.json", "config.json")):
            raise SystemExit(
                f"{flag}: got {shown(target)!r}, expected a name such as BiliComments: {shown(folder)} is a model's "
                "folder, and another model cannot lie inside of it."
            )
    if problem := write_problem(target.parent):
        raise SystemExit(f"{flag}: {problem}")
    if not target.exists() and not target.is_symlink():
        return
    way_out = f"Move it away, or give the new model another name: {flag} NAME"
    if target.is_symlink() or not all((target / file).is_file() for file in ("run.json", "config.json")):
        raise SystemExit(f"{flag}: {shown(target)} is there and is no earlier conversion. {way_out}")
    with explained(f"{flag}: {shown(target / 'run.json')} cannot be read. {way_out}"):
        sizes = read_json(target / "run.json").get("files")  # Earlier versions did not list them.
    there = {path.name: path.stat().st_size for path in target.iterdir() if path.is_file()}
    # The first is a folder of transformers.
    written = {"additional_chat_templates", "run.json", *(there if sizes is None else sizes)}
    if others := sorted(path.name for path in target.iterdir() if path.name not in written):
        raise SystemExit(
            f"{flag}: {shown(target)} is there and holds other things than a conversion: {', '.join(others)}. {way_out}"
        )
    if changed := sorted(name for name, size in (sizes or {}).items() if there.get(name, size) != size):
        raise SystemExit(f"{flag}: {shown(target / changed[0])} was changed after it was written. {way_out}")


def is_own(folder: Path, file: Path) -> bool:
    """Whether a file of a folder lies in it, links followed, or in the cache of the Hugging Face Hub."""
    real = file.resolve()
    in_cache = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    return in_cache or real.is_relative_to(folder.resolve())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads a JSON-lines file that is appended to.

    A last line torn by a kill is left out, and so are damaged lines, whose numbers are printed.

    Args:
        path: The file; one that is not there has no lines.
        fields: What every line has at least, and of which types.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows, damaged = [], []
    # What follows the last line break is empty, or a line that was not finished.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + (f" and {len(damaged) - 10} more" if damaged[10:] else "")
        print(f"{shown(path)}: damaged and left out: line{'s' if damaged[1:] else ''} {numbers}.")
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON object a line, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def reason_of(error: Exception) -> str:
    """The message of a library's error, shortened: of hundreds of mismatching sizes, or of several, the first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:3]) or repr(error)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns any error that a library raises on damaged files into a one-line exit message.

    Args:
        what: Did not come about.
    """
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{what}: {reason_of(error)}") from error


@contextmanager
def exclusive_lock(path: Path, wait_sec: float = 0) -> Iterator[None]:
    """Keeps other processes from writing to a place until the block ends.

    Args:
        path: A file or folder, which need not exist. Its parent folder is made, and removed if nothing stays there.
        wait_sec: How long to wait for another one; -1: until it ends.

    Raises:
        SystemExit: if another process is writing there.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A singleton lock for each path: nested blocks for the same path are allowed.
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=wait_sec)
    except Timeout:
        raise SystemExit(
            f"Another process is writing {shown(path)}. Wait until it has ended, or name another place."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)  # Who waits for it notices, and makes another.
        lock.release()
        with suppress(OSError):
            for folder in new_folders:
                folder.rmdir()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Lets the caller write a file or a folder beside its place and moves it there when the block ends well.

    After a failure or a kill inside the block the old content of `path` is unchanged. What a killed run left beside it
    is removed by the next run.

    Args:
        path: The final place. Its parent folder is made.

    Yields:
        A path in the same folder that does not exist yet.

    Raises:
        SystemExit: if another process is writing there, and does so for a second.
    """
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("partial", "old"))
    with exclusive_lock(path, wait_sec=1):
        _remove(temporary)
        if old.exists() and not path.exists():
            old.rename(path)  # A kill came between the two renames below.
        try:
            yield temporary
            if path.is_dir() and not path.is_symlink() and temporary.exists():
                # A non-empty folder cannot be replaced in one step: it is moved aside first.
                _remove(old)
                path.rename(old)
                temporary.rename(path)
            else:
                os.replace(temporary, path)
        finally:
            _remove(temporary)
            if path.exists():
                _remove(old)


@contextmanager
def atomic_writes(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Lets the caller write files that belong together, each as `atomic_write` does.

    The first one is removed before any other changes, and written last: whatever ends the program, it is never beside
    files of another run.

    Args:
        paths: Their places; the first is of the file without which the others are of no use.

    Yields:
        Where to write each.

    Raises:
        SystemExit: if another process is writing there.
    """
    with exclusive_lock(paths[0]), ExitStack() as files:
        yield [files.enter_context(atomic_write(path)) for path in paths]
        paths[0].unlink(missing_ok=True)


@contextmanager
def create_once(path: Path) -> Iterator[Path | None]:
    """Creates a file or folder once: of several processes one creates it, the others wait.

    Sizes and hashes are kept beside it: what has changed since it was made is made anew.

    Args:
        path: The place.

    Yields:
        Where to make it, as `replacing` does; None if it is there already.
    """
    with exclusive_lock(path, wait_sec=-1):
        drop_damaged(path)
        if path.exists():
            yield None
        else:
            with atomic_write(path) as temporary:
                yield temporary
            with atomic_write(_contents_file(path)) as temporary:
                temporary.write_text(json.dumps(_contents(path)), encoding="utf-8")


def drop_damaged(path: Path) -> None:
    """Removes what `create_once` created if it has changed since, and says so."""
    with exclusive_lock(path, wait_sec=-1):
        if not path.exists():
            return
        try:
            whole = json.loads(_contents_file(path).read_text(encoding="utf-8")) == _contents(path)
        except (OSError, ValueError):
            whole = False
        if not whole:
            print(f"{shown(path)} is damaged, or an earlier version made it: it is made anew.")
            _remove(path)


def _contents_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.contents.json")


def _contents(path: Path) -> dict[str, list[Any]]:
    """Size and hash of a file, or of each of a folder's files by its name there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): [file.stat().st_size, sha256(file)] for file in files}


def sha256(path: Path) -> str:
    """Hashes a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes manifest.json, the hashes of a finished folder's files. It is the last file to be written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    with atomic_write(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(hashes, indent=1))


def check_manifest(folder: Path) -> None:
    """Makes sure that a folder is complete and unchanged. It does not tell who made it.

    Raises:
        SystemExit: naming the first file that is missing or differs.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise SystemExit(
            f"{shown(folder)} is not a complete checkpoint: it has no manifest.json, by which its files are known. If "
            "you know where they come from: --trust_checkpoint True"
        )
    try:
        hashes = json.loads(manifest.read_text())
    except ValueError as error:
        raise SystemExit(f"{shown(manifest)} is damaged ({error}). Use another checkpoint of the run.") from error
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {manifest.name}
    if not isinstance(hashes, dict) or not all(isinstance(text, str) for item in hashes.items() for text in item):
        raise SystemExit(f"{shown(manifest)} is damaged. Use another checkpoint of the run.")
    if differing := sorted(there ^ hashes.keys()):
        what = "missing" if differing[0] in hashes else "not one of its files"
        raise SystemExit(f"{shown(folder)} is not a complete checkpoint: {differing[0]} is {what}.")
    for name, expected in hashes.items():
        if sha256(folder / name) != expected:
            raise SystemExit(f"{shown(folder / name)} is damaged: its content is not what the training run wrote.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
