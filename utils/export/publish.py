"""Publishing a finished model: laid out in a git clone of a hub's repository, or uploaded to a hub without git."""

import contextlib
import filecmp
import glob
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from utils.files import atomic_write, exclusive_lock, from_root, reason_of, shown

STUB = "当前模型的贡献者未提供更加详细的模型介绍"  # ModelScope's words in the card of a new repository.

# Left by an earlier model they would be loaded in place of the new one's files, beside them, or for nothing: weights,
# an adapter, the tokenizers of other versions.
LEFT = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.*", "generation_config.json", "chat_template.*", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "Modelfile", "*-f16.gguf", "*-bf16.gguf", "*-q8_0.gguf",
)  # fmt: skip

# What is large in some model at least: hubs refuse files of 10 MB and more that git holds without git-lfs.
LARGE = ("*.safetensors", "*.gguf", "*.bin", "*.model", "tokenizer.json")
PLAIN_BYTES = 10_000_000
ONE_PIECE_BYTES = 5_000_000_000  # Hugging Face takes larger files in parts only.

# Where a token comes from: its variable, the page that makes one, and the command that keeps one.
TOKENS = {
    "huggingface": ("HF_TOKEN", "https://huggingface.co/settings/tokens", "hf auth login"),
    "modelscope": ("MODELSCOPE_API_TOKEN", "https://modelscope.cn/my/myaccesstoken", "modelscope login"),
}


def model_files(model: Path) -> dict[str, Path]:
    """Finds what belongs to a finished model, by the names that it has in a repository."""
    paths = [*model.glob("[!.]*"), *model.glob("additional_chat_templates/[!.]*")]
    return {path.relative_to(model).as_posix(): path for path in sorted(paths) if path.is_file()}


def outdated(there: Iterable[str], files: dict[str, Path]) -> list[str]:
    """Files of an earlier model in a repository that would conflict with this one."""
    return sorted(
        name
        for name in there
        if "/" not in name and name not in files and any(fnmatchcase(name, pattern) for pattern in LEFT)
    )


def is_edited_card(card: Path, new: Path) -> bool:
    """Whether a model card may have been edited: it has text that differs from the new card's."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    return bool(body) and STUB not in body and text != new.read_text(encoding="utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# With git


def check_clone(clone: Path) -> None:
    """Makes sure that a folder is a git clone of its own.

    Raises:
        SystemExit: saying what it is, and how to get one.
    """
    where = shlex.quote(str(clone))
    how = f"Clone the model's repository beside this one: git clone https://huggingface.co/ORG/NAME {where}"
    if not shutil.which("git"):
        raise SystemExit("--publish_dir needs git. Install it: sudo apt-get install git git-lfs")
    if not clone.is_dir():
        raise SystemExit(f"--publish_dir: there is no folder {shown(clone)}. {how}")
    command = ["git", "-C", str(clone), "rev-parse", "--show-toplevel"]
    asked = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    top = asked.stdout.removesuffix("\n")
    if asked.returncode or not top:
        said = asked.stderr.partition("\n")[0] or "it has no files of its own"
        raise SystemExit(f"--publish_dir: {shown(clone)} is no git clone ({said}). {how}")
    if Path(top).resolve() == from_root("").resolve():
        raise SystemExit(f"--publish_dir: {shown(clone)} belongs to this project's own repository. {how}")
    if Path(top).resolve() != clone.resolve():
        raise SystemExit(f"--publish_dir: {shown(clone)} is a folder of the git clone {shown(top)}. {how}")


def lay_out(model: Path, clone: Path) -> None:
    """Brings a git clone to the state of a model: its files, none of an earlier one, git-lfs for what is large.

    Files are written atomically, and unchanged ones are not written again. Nothing is committed.

    Args:
        model: A finished model's folder.
        clone: The git clone; see `check_clone`.

    Raises:
        SystemExit: if the disk has not the room, git would leave out a file, or another process is writing there.
    """
    with exclusive_lock(clone / "README.md"):
        _lay_out(model, clone)


def _lay_out(model: Path, clone: Path) -> None:
    files = model_files(model)
    left = [*clone.glob(".*.partial"), *clone.glob("additional_chat_templates/.*.partial")]
    left += [path.with_suffix(".lock") for path in left]
    left += [(clone / name).with_name(f".{Path(name).name}.lock") for name in files if name != "README.md"]
    for path in left:  # A kill's, which git would take along.
        path.unlink(missing_ok=True)
    changed = {name: path for name, path in files.items() if not _is_there(path, clone / name)}
    if "README.md" in changed and is_edited_card(clone / "README.md", model / "README.md"):
        path = changed.pop("README.md")
        print(
            f"Kept {shown(clone / 'README.md')}, which somebody may have completed. The new model's card is another "
            f"one; to take it: cp {shlex.quote(str(path))} {shlex.quote(str(clone))}/"
        )
    _check_disk_space(clone, sum(path.stat().st_size for path in changed.values()))
    _write_attributes(clone / ".gitattributes", files)
    for name in outdated([path.name for path in clone.iterdir() if not path.is_dir()], files):
        (clone / name).unlink()
        print(f"Removed {shown(clone / name)}, which an earlier model left.")
    for name, path in changed.items():
        with atomic_write(clone / name) as temporary:
            shutil.copyfile(path, temporary)
    command = ["git", "-C", str(clone), "check-ignore", *files]
    if ignored := subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]:
        raise SystemExit(
            f"--publish_dir: git would leave out {', '.join(ignored)}, because of a .gitignore of the clone or of your "
            f"own. To see which: git -C {shlex.quote(str(clone))} check-ignore -v {shlex.quote(ignored[0])}"
        )
    print(f"Laid out in {shown(clone)}: {len(files)} files, of which {len(changed)} are new or changed.")


def _is_there(path: Path, copy: Path) -> bool:
    return copy.is_file() and not copy.is_symlink() and filecmp.cmp(path, copy, shallow=False)


def _check_disk_space(clone: Path, new_bytes: int) -> None:
    """Checks the free disk space for files and git's copies of them."""
    free = shutil.disk_usage(clone).free
    if free < 2 * new_bytes:
        raise SystemExit(
            f"--publish_dir: {shown(clone)} needs {2 * new_bytes / 1e9:.2f} GB for the files and git-lfs' copies of "
            f"them, {free / 1e9:.2f} GB are free. Make room, or upload without git: --push ORG/NAME"
        )


def _write_attributes(path: Path, files: dict[str, Path]) -> None:
    """Adds to .gitattributes what git-lfs has to hold."""
    # What a link leads to is no business of git's.
    own = path.is_file() and not path.is_symlink()
    text = path.read_bytes().decode(errors="surrogateescape") if own else ""
    held = {line.split()[0] for line in text.splitlines() if "filter=lfs" in line.split()[1:]}
    large = [name for name, file in files.items() if file.stat().st_size >= PLAIN_BYTES]
    others = [name for name in large if not any(fnmatchcase(name, pattern) for pattern in LARGE)]
    patterns = [*LARGE, *(re.sub(r"\s", "[[:space:]]", name) for name in others)]
    if missing := [pattern for pattern in patterns if pattern not in held]:
        text += "" if not text or text.endswith("\n") else "\n"
        text += "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in missing)
        with atomic_write(path) as temporary:
            temporary.write_bytes(text.encode(errors="surrogateescape"))


def git_commands(model: Path, clone: Path) -> str:
    """Writes the commands that publish what is laid out. Each runs if the one before did, and all may run again."""
    commands = [f"cd {shlex.quote(str(clone.resolve()))}", "git lfs install --local"]
    if any(path.stat().st_size > ONE_PIECE_BYTES for path in model_files(model).values()):
        commands.append("hf lfs-enable-largefiles .")
    message = shlex.quote(f"Publish {model.name}")
    commands += ["git add -A", f"{{ git diff --cached --quiet || git commit -m {message}; }}", "git push"]
    return " &&\n".join(commands)


# ---------------------------------------------------------------------------------------------------------------------
# Without git


def check_upload(repo_id: str, hub: str) -> None:
    """Makes sure, before anything that takes long, that a name is one and that there is a token.

    Raises:
        SystemExit: saying how to name the repository, or where the token comes from.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII) or ".." in repo_id:
        raise SystemExit(f"--push: got {repo_id!r}, expected ORG/NAME, such as your-name/Qwen2.5-3B-BiliComments.")
    _endpoint(hub)
    if not _find_token(hub):
        variable, page, login = TOKENS[hub]
        raise SystemExit(
            f"--push: no token for {hub}. Make one that may write at {page} and paste it, unseen, into: "
            f"read -rs {variable} && export {variable}\nOr keep one on this machine: {login}"
        )


def _endpoint(hub: str) -> str:
    name = "HF_ENDPOINT" if hub == "huggingface" else "MODELSCOPE_ENDPOINT"
    default = "https://huggingface.co" if hub == "huggingface" else "https://modelscope.cn"
    endpoint = os.environ.get(name, "").rstrip("/") or default
    if not endpoint.startswith(("http://", "https://")):
        raise SystemExit(f"{name} must be an address that starts with https://, got {endpoint!r}.")
    return endpoint


def _find_token(hub: str) -> str:
    """Reads the token from the environment, or what a hub's own log-in has left."""
    if hub == "huggingface":
        from huggingface_hub import get_token

        return (get_token() or "").strip()
    from modelscope_hub.config import HubConfig

    return (HubConfig().token or "").strip()


def push(model: Path, repo_id: str, hub: str, public: bool) -> None:
    """Uploads a model to a hub, and prints where it is.

    Args:
        model: A finished model's folder.
        repo_id: ORG/NAME. Created if it does not exist; the visibility of an existing one is not changed.
        hub: "huggingface" or "modelscope".
        public: Whether everybody may see a new repository.

    Raises:
        SystemExit: with the hub's or its client's reason in one sentence, without the token.
    """
    check_upload(repo_id, hub)
    token, endpoint = _find_token(hub), _endpoint(hub)
    page = f"{endpoint}/{'' if hub == 'huggingface' else 'models/'}{repo_id}"
    print(f"Uploading {shown(model)} to {page} ...", flush=True)
    with _in_words(hub, repo_id, page, token), tempfile.TemporaryDirectory() as scratch:
        upload = _push_hf if hub == "huggingface" else _push_modelscope
        is_new = upload(model, repo_id, endpoint, token, public, Path(scratch))
    seen = f"new, {'public' if public else 'private'}" if is_new else "it was there, and who may see it has not changed"
    print(f"Published: {page} ({seen})")


def _push_hf(model: Path, repo_id: str, endpoint: str, token: str, public: bool, scratch: Path) -> bool:
    """Uploads in one commit; returns whether the repository is new."""
    from huggingface_hub import HfApi

    api, files = HfApi(endpoint=endpoint, token=token), model_files(model)
    is_new = not api.repo_exists(repo_id)
    if is_new:
        api.create_repo(repo_id, private=not public, exist_ok=True)
    there = api.list_repo_files(repo_id)
    if "README.md" in there:
        card = Path(api.hf_hub_download(repo_id, "README.md", local_dir=scratch))
        _keep_card(card, files, model)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=model,
        allow_patterns=[glob.escape(name) for name in files],
        delete_patterns=[glob.escape(name) for name in _removed(there, files)] or None,
        commit_message=f"Publish {model.name}",
    )
    return is_new


def _push_modelscope(model: Path, repo_id: str, endpoint: str, token: str, public: bool, scratch: Path) -> bool:
    """Uploads, then deletes what an earlier model left; returns whether the repository is new."""
    from modelscope_hub import HubApi

    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
    api, files = HubApi(endpoint=endpoint, token=token), model_files(model)
    api.uploader._create_repo_fn = None  # It would make a repository that is not there, and make it public.
    is_new = not api.repo_exists(repo_id, "model")
    if is_new:
        visibility = "public" if public else "private"
        api.create_repo(repo_id, "model", visibility=visibility, license=_license(model))
    there = [file.path for file in api.list_repo_files(repo_id, "model") if not file.is_dir]
    if "README.md" in there:
        card = Path(api.download_file(repo_id, "model", "README.md", local_dir=scratch))
        _keep_card(card, files, model)
    with _said_once(token), contextlib.redirect_stdout(io.StringIO()):  # The client prints a report of its own.
        api.upload_folder(
            repo_id,
            "model",
            model,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=f"Publish {model.name}",
            use_cache=False,  # It would lie among the model's files; the hub knows itself what it has.
        )
    if old := _removed(there, files):
        api.delete_files(repo_id, "model", old, commit_message="Remove what an earlier model left")
    return is_new


def _removed(there: Iterable[str], files: dict[str, Path]) -> list[str]:
    old = outdated(there, files)
    if old:
        print(f"To be removed there, which an earlier model left: {', '.join(old)}.", flush=True)
    return old


@contextmanager
def _said_once(token: str) -> Iterator[None]:
    """Lets ModelScope's client raise why an upload failed; it would log that, file by file, and raise how many did."""
    failures: list[Exception] = []

    def wanted(record: logging.LogRecord) -> bool:
        failures.extend(part for part in record.args or () if isinstance(part, Exception))
        return record.levelno < logging.ERROR and token not in record.getMessage()

    logger = logging.getLogger("modelscope_hub.upload")
    logger.addFilter(wanted)
    try:
        yield
    except Exception as error:
        raise failures[-1] if failures else error from None
    finally:
        logger.removeFilter(wanted)


def _license(model: Path) -> str:
    """Names the card's licence as ModelScope's form does; left out, it would say Apache-2.0."""
    from huggingface_hub import ModelCard
    from modelscope_hub.constants import License

    card = ModelCard.load(model / "README.md").data if (model / "README.md").is_file() else None
    known = {str(name).lower(): str(name) for name in License}
    return known.get(str(getattr(card, "license", "")).lower(), str(License.OTHER))


def _keep_card(card: Path, files: dict[str, Path], model: Path) -> None:
    """Does not upload the new card over one on the hub that may have been edited."""
    if "README.md" in files and is_edited_card(card, files["README.md"]):
        files.pop("README.md")
        print(
            "Kept the hub's model card, which somebody may have completed. The new model's card is another one; take "
            f"over from {shown(model / 'README.md')} what has changed."
        )


@contextmanager
def _in_words(hub: str, repo_id: str, page: str, token: str) -> Iterator[None]:
    """Ends with one sentence where a hub or its client fails. A token that the failure repeats is cut out."""
    variable, tokens_page, _ = TOKENS[hub]
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. Run it again: what has arrived is not sent again.") from None
    except Exception as error:
        status = _status(error)
        if status == 401:
            said = f"the token is not accepted. Make one that may write at {tokens_page} and put it into {variable}."
        elif status == 403:
            said = (
                f"the token may not write there. Is {repo_id.split('/')[0]} your name, or an organisation that you may "
                f"write for, and may the token write ({tokens_page})?"
            )
        elif status == 404:
            said = f"nothing is there under this name. Is {repo_id.split('/')[0]} your name on {hub}, capitals too?"
        else:
            said = f"{type(error).__name__}: {reason_of(error)}"
            if status is None or status >= 500:
                said += "\nRun it again when the hub can be reached: what has arrived is not sent again."
        raise SystemExit(f"Could not publish to {page}: {said}".replace(token, "***")) from None


def _status(error: Any) -> int | None:
    """Finds the HTTP status behind an error that may be wrapped in others."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
        if status:
            return status
        error = error.__cause__ or error.__context__
    return None
