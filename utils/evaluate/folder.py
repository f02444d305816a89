"""An evaluation's folder: what was asked for, and what is known so far, line by line, so that a kill costs little.

settings.json      what must be equal when it goes on
replies.jsonl      {"contender", "id", "video_id", "messages", "real", "replies", "cut"}: a contender's replies to
                   one comment; `messages` are the data's, without the answer
likelihoods.jsonl  {"contender", "of", "id", "nats"}: ln p of answers after the question of the comment `id`; `nats`
                   names the comments whose answers they are: the real ones, or the first replies of the contender
                   `of`
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.data.collector import append, cut_torn_line
from utils.data.held_out import Comment
from utils.data.records import Message
from utils.evaluate.contenders import BASE, Contender
from utils.evaluate.measures import Evidence
from utils.files import atomic_write, explained, read_json, read_lines, shown

REAL = "real"
REPLY_FIELDS = {
    "contender": str,
    "id": str,
    "video_id": str,
    "messages": list,
    "real": str,
    "replies": list,
    "cut": list,
}
# Settings without which two evaluations do not measure the same.
COMPARED = ("data", "limit", "matched", "seed", "base", "train_data", "columns", "style prompt", "shots", "replies",
            "max_new_tokens", "temperature", "top_p")  # fmt: skip
LIKELIHOOD_FIELDS = {"contender": str, "of": str, "id": str, "nats": dict}


class EvaluationFolder:
    """The files of one evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies, self._likelihoods = path / "replies.jsonl", path / "likelihoods.jsonl"

    def open(
        self, settings: Mapping[str, Any], contenders: Sequence[Contender], train: Path | None, overwrite: bool
    ) -> None:
        """Starts an evaluation, or goes on with one of the same settings.

        Args:
            settings: What is equal for all contenders.
            contenders: Further ones may join later.
            train: The training records' file, for later comparisons.
            overwrite: Whether what is there is thrown away.

        Raises:
            SystemExit: if another evaluation is there.
        """
        place = self.path / "settings.json"
        known = read_json(place) if place.is_file() and not overwrite else None
        prints, kinds = (
            {one.name: value for one, value in zip(contenders, values, strict=True)}
            for values in ([one.fingerprint() for one in contenders], [one.kind for one in contenders])
        )
        if known is not None:
            self._check(known, settings, prints)
            prints, kinds = known["contenders"] | prints, known["kinds"] | kinds
        else:
            # Guesses are of replies that are thrown away.
            others = [self.path / name for name in ("report.html", "report.json", "guesses.jsonl")]
            for path in (self._replies, self._likelihoods, *others):
                path.unlink(missing_ok=True)
        said = {"settings": settings, "contenders": prints, "kinds": kinds, "train_data": train and str(train)}
        with atomic_write(place) as temporary:
            temporary.write_text(json.dumps(said, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in (self._replies, self._likelihoods):
            cut_torn_line(path)

    def _check(self, known: Mapping[str, Any], settings: Mapping[str, Any], prints: Mapping[str, str]) -> None:
        way_out = f"Give it another --name, or throw away what {shown(self.path)} holds: --overwrite"
        for name, now in settings.items():
            if (was := known["settings"].get(name)) != now:
                raise SystemExit(f"{shown(self.path)} was made with {name} {was!r}, not {now!r}. {way_out}")
        for name, now in prints.items():
            if known["contenders"].get(name, now) != now:
                raise SystemExit(f"{shown(self.path)} knows another {name!r}: its files have changed. {way_out}")

    def answered(self, contender: str) -> set[str]:
        """The comments that a contender has answered."""
        return {row["id"] for row in read_lines(self._replies, REPLY_FIELDS) if row["contender"] == contender}

    def read(self, contender: str, of: str) -> set[str]:
        """The comments after whose questions a contender has read somebody's answers."""
        rows = read_lines(self._likelihoods, LIKELIHOOD_FIELDS)
        return {row["id"] for row in rows if (row["contender"], row["of"]) == (contender, of)}

    def add_replies(self, contender: str, comment: Comment, replies: list[str], cut: list[bool]) -> None:
        """Keeps a contender's replies."""
        *messages, answer = comment.messages
        row = {"contender": contender, "id": comment.id, "video_id": comment.video_id, "messages": messages}
        append(self._replies, [row | {"real": answer["content"], "replies": replies, "cut": cut}])

    def add_likelihoods(self, contender: str, id: str, nats: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps what a contender found after one question: writer -> comment -> nats."""
        rows = [{"contender": contender, "of": of, "id": id, "nats": dict(found)} for of, found in nats.items()]
        append(self._likelihoods, rows)

    def replies(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Contender -> comment -> its line."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in read_lines(self._replies, REPLY_FIELDS):
            found.setdefault(row["contender"], {})[row["id"]] = row
        return found

    def evidence(self, kinds: Mapping[str, str], reader: str) -> list[Evidence]:
        """All that is known of some contenders.

        Args:
            kinds: Name -> kind.
            reader: The contender who has read the others' replies.
        """
        real: dict[str, dict[str, dict[str, float]]] = {}
        written: dict[str, dict[str, dict[str, float]]] = {}
        for row in read_lines(self._likelihoods, LIKELIHOOD_FIELDS):
            if row["of"] == REAL:
                found = real.setdefault(row["contender"], {})
            elif row["contender"] == reader:
                found = written.setdefault(row["of"], {})
            else:
                continue
            for id, nats in row["nats"].items():
                found.setdefault(id, {})[row["id"]] = nats
        rows, known = self.replies(), []
        for name, kind in kinds.items():
            own = rows.get(name, {})
            replies, cut = ({id: row[field] for id, row in own.items()} for field in ("replies", "cut"))
            known.append(Evidence(name, kind, replies, cut, real.get(name, {}), written.get(name, {})))
        return known


def joined(folders: Sequence[Path]) -> tuple[list[Comment], list[Evidence], Path | None, dict[str, str] | None]:
    """Several evaluations as one: everybody who answered in one of them, named after it.

    Returns:
        The comments that are the same in all; what is known of each contender; the first one's training records and
        the names of their fields.

    Raises:
        SystemExit: if one is no evaluation, two have the same name, or they have no comments in common.
    """
    names = [path.name for path in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SystemExit(f"--compare: two evaluations are named {twice[0]!r}. Give one of the folders another name.")
    comments: dict[str, Comment] | None = None
    evidence: list[Evidence] = []
    made_with: list[dict[str, Any]] = []
    for path in folders:
        folder = EvaluationFolder(path)
        with explained(f"--compare: {shown(path)} is no evaluation"):
            said = read_json(path / "settings.json")
            kinds, rows = said["kinds"], [row for own in folder.replies().values() for row in own.values()]
        made_with.append(said["settings"])
        own = {row["id"]: Comment(row["id"], row["video_id"], [*row["messages"], answer_of(row)]) for row in rows}
        comments = own if comments is None else {id: one for id, one in comments.items() if own.get(id) == one}
        if short := [name for name in kinds if len(folder.answered(name)) < len(own)]:
            print(f"Note: {shown(path)} is not finished: {', '.join(short)} did not answer all comments.")
        if "judged" in read_report(path).get("verdicts", {}):
            print(f"Note: what the judge said in {shown(path)} is left out.")
        evidence += [one._replace(name=f"{path.name}: {one.name}") for one in folder.evidence(kinds, BASE)]
    differing = [name for name in COMPARED if len({json.dumps(settings.get(name)) for settings in made_with}) > 1]
    if differing:
        print(f"Note: they were made with different {', '.join(differing)}; what differs may be that.")
    train = read_json(folders[0] / "settings.json").get("train_data")
    if not comments:
        raise SystemExit(f"--compare: {', '.join(map(shown, folders))} have no held-out comments in common.")
    return [*comments.values()], evidence, Path(train) if train else None, made_with[0].get("columns")


def read_report(path: Path) -> dict[str, Any]:
    """An evaluation's report.json, as far as there is one."""
    return read_json(path / "report.json") if (path / "report.json").is_file() else {}


def answer_of(row: Mapping[str, Any]) -> Message:
    """The real answer of a line of replies.jsonl."""
    return {"role": "assistant", "content": row["real"]}
