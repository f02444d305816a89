"""A tokenizer as llama.cpp holds it in a GGUF file, and a chat template as Ollama holds it in a Modelfile.

llama.cpp has a tokenizer of its own (src/llama-vocab.cpp). What it would split otherwise than the model's is refused.
"""

import json
import re
from itertools import groupby
from typing import Any

from utils.data.chat import Chat
from utils.serve.generate import end_ids

# How text is split before byte pairs are merged: the expression in the tokenizer, and whether words that the vocabulary
# holds are taken whole -> llama.cpp's name for it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 3.5's counts marks above and below letters to the letters.
WORDS_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SPLITS = {
    (WORDS % "", False): "qwen2",
    (WORDS_WITH_MARKS, False): "qwen35",
    (WORDS % "{1,3}", False): "dbrx",
    (WORDS % "{1,3}", True): "llama-bpe",
}
# A message's text with what stands before it, and what stands before the answer that is asked for.
GO_TEMPLATE = """
{{ $before := "" }}{{ range .Messages }}
{{ if eq .Role "system" }}<SYSTEM>
{{ else if eq .Role "assistant" }}<ANSWER>
{{ else if eq $before "" }}<FIRST>
{{ else if eq $before "system" }}<BRIEFED>
{{ else }}<NEXT>{{ end }}
{{ .Content }}{{ $before = .Role }}{{ end }}
{{ if ne $before "assistant" }}<TAIL>{{ end }}
"""
SPACE = "▁"  # Stands for a space in the pieces of sentencepiece.


def add_tokenizer(writer: Any, chat: Chat, rows: int) -> None:
    """Adds a tokenizer and its chat template to a GGUF file.

    Args:
        writer: gguf's GGUFWriter.
        chat: The tokenizer and its template.
        rows: Of the model's embedding; those without a token get names that no text has.

    Raises:
        ValueError: if llama.cpp has no such tokenizer.
    """
    from gguf import TokenType

    tokenizer = chat.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = state["model"], tokenizer.added_tokens_decoder
    # Gemma 3 has a token for pictures behind the last row.
    vocabulary = {token: id for token, id in tokenizer.get_vocab().items() if id < rows or id not in added}
    if model["type"] != "BPE" or max(vocabulary.values()) >= rows:
        raise ValueError(f"its tokenizer is none of the kind BPE, or has more tokens than the embedding ({rows}).")
    pieces = bool(model["byte_fallback"])  # As sentencepiece makes them; else bytes, as GPT-2.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = {id: (token, TokenType.NORMAL) for token, id in vocabulary.items()}
    if pieces:
        is_byte = {f"<0x{byte:02X}>" for byte in range(256)}
        tokens |= {id: (token, TokenType.BYTE) for id, (token, _) in tokens.items() if token in is_byte}
    for id, token in added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(f"llama.cpp does not take the spaces around {token.content!r} away as the tokenizer does.")
        if pieces and token.normalized and not token.special:
            raise ValueError(f"llama.cpp looks for {token.content!r} before spaces are replaced, the tokenizer after.")
        tokens[id] = (token.content, TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if pieces and model["unk_token"] is not None:
        tokens[vocabulary[model["unk_token"]]] = (model["unk_token"], TokenType.UNKNOWN)
    listed = [tokens.get(id, (f"[PAD{id}]", TokenType.UNUSED)) for id in range(rows)]
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([int(kind) for _, kind in listed])
    adds_bos = writes_bos(chat)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        own_order = {token.content for token in added.values()}
        writer.add_token_scores(piece_scores([token for token, _ in listed], merges, own_order))
        writer.add_add_space_prefix(adds_space(state, adds_bos))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(state))
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    if chat.stop_id != tokenizer.eos_token_id:
        writer.add_eot_token_id(chat.stop_id)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def writes_bos(chat: Chat) -> bool:
    """Whether a prompt begins with the token that begins texts; llama.cpp puts it there, and not the template."""
    ids = chat.prompt_ids([{"role": "user", "content": "question"}])
    return chat.tokenizer.bos_token_id is not None and ids[0] == chat.tokenizer.bos_token_id


def split_name(state: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer splits text.

    Args:
        state: Of the tokenizer, as tokenizer.json holds it.

    Raises:
        ValueError: if it has none.
    """
    before = state["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    whole = bool(state["model"].get("ignore_merges"))
    name = None
    if steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        match steps[:-1], steps[-1]["use_regex"]:
            case [{"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}], False:
                name = SPLITS.get((expression, whole))
            case [{"type": "Digits", "individual_digits": True}], True if not whole:
                name = "smollm"
            case [], True if not whole:
                name = "gpt-2"
    # llama.cpp does not compose letters and accents; Chinese text has none.
    if name is None or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise ValueError(f"llama.cpp does not split text as this tokenizer does: {before}, {state['normalizer']}.")
    return name


def adds_space(state: dict[str, Any], adds_bos: bool) -> bool:
    """Whether a space is put before text, as sentencepiece does.

    Args:
        state: Of the tokenizer, as tokenizer.json holds it.
        adds_bos: Whether a prompt begins with a control token: then what is put only at a text's very beginning is
            never put.

    Raises:
        ValueError: if llama.cpp does not treat spaces so.
    """
    normalizer, before = state["normalizer"] or {}, state["pre_tokenizer"]
    changes = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    put = changes.count({"type": "Prepend", "prepend": SPACE})
    replaced = changes.count({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if replaced and put + replaced == len(changes):
        # Splitting at spaces has no effect where none is left.
        if before is None or (before["type"], before.get("pattern")) == ("Split", {"String": " "}):
            return bool(put)
    elif changes == [{}] and before and before["type"] == "Metaspace" and not before["split"]:
        scheme, others = before["prepend_scheme"], [token for token in state["added_tokens"] if not token["special"]]
        if scheme == "always" and others:
            # It puts none before text that begins with a space, such as what follows such a token. llama.cpp does.
            raise ValueError(f"llama.cpp treats a space after {others[0]['content']!r} in another way.")
        return scheme == "always" or (scheme == "first" and not adds_bos)
    raise ValueError(f"llama.cpp does not split text as this tokenizer does: {before}, {normalizer}.")


def piece_scores(tokens: list[str], merges: list[str], own_order: set[str]) -> list[float]:
    """Scores with which llama.cpp merges pieces in the order of a list of merges: the sooner, the higher.

    Args:
        tokens: All, by id.
        merges: Two pieces with a space between them.
        own_order: Tokens that sentencepiece gives no rank, such as Gemma's rows of spaces; they are not looked at.

    Raises:
        ValueError: if the list is not one of sentencepiece: any two pieces that make a third, third by third.
    """
    made = [merge.replace(" ", "") for merge in merges]
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(made))}
    known, listed, ranked = set(tokens), set(merges), [piece for piece in ranks if piece not in own_order]
    pairs = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    whole = all(f"{left} {right}" in listed for left, right in pairs if left in known and right in known)
    if not whole or [piece for piece, _ in groupby(made) if piece not in own_order] != ranked:
        raise ValueError("llama.cpp does not merge pieces in the order in which this tokenizer does.")
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def modelfile(chat: Chat, gguf: str, system_prompt: str, generation: Any) -> str:
    """Writes the Modelfile with which `ollama create` takes a GGUF file.

    Args:
        chat: The model's tokenizer and template.
        gguf: The file's name.
        system_prompt: What the model was trained with.
        generation: Its settings of generation.

    Raises:
        ValueError: if Ollama cannot write the chat template, or the system text.
    """
    tokenizer = chat.tokenizer
    if '"""' in system_prompt:
        raise ValueError('a Modelfile cannot hold a system text with three " in a row.')
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(chat)}"""']
    lines += [f'SYSTEM """{system_prompt}"""'] if system_prompt else []
    stops = [tokenizer.decode([id]) for id in end_ids(generation, chat.stop_id)]
    if unusable := next((stop for stop in stops if '"' in stop or "\n" in stop), None):
        raise ValueError(f"a Modelfile cannot hold the stop text {unusable!r}.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repeat_penalty": "repetition_penalty"}
    for theirs, ours in names.items():
        if (value := getattr(generation, ours, None)) is not None:
            lines.append(f"PARAMETER {theirs} {value}")
    return "\n".join(lines) + "\n"


def go_template(chat: Chat) -> str:
    """Writes a chat template in the language of Ollama: what stands around texts, found by writing marks for them.

    Raises:
        ValueError: if more than that depends on the texts.
    """
    marks = ["FIRST-QUESTION", "FIRST-ANSWER", "SECOND-QUESTION", "BRIEFING"]
    roles = dict(zip(marks, ("user", "assistant", "user", "system"), strict=True))
    head, tail = _around(chat, roles, marks[:1])
    other_head, answer, question, other_tail = _around(chat, roles, marks[:3])
    if chat.folds_system:
        system, briefed = head, "\n\n"
        whole = [system, briefed, answer, question, tail]
    else:
        system, briefed, _ = _around(chat, roles, [marks[3], marks[0]])
        whole = _around(chat, roles, [marks[3], *marks[:3]])
    if (head, tail) != (other_head, other_tail) or whole != [system, briefed, answer, question, tail]:
        raise ValueError("its chat template writes earlier turns otherwise than the last one.")
    if writes_bos(chat):  # llama.cpp puts it there.
        head, system = (text.removeprefix(chat.tokenizer.bos_token) for text in (head, system))

    parts = {"SYSTEM": system, "ANSWER": answer, "FIRST": head, "BRIEFED": briefed, "NEXT": question, "TAIL": tail}
    written = {name: json.dumps(text, ensure_ascii=False) for name, text in parts.items() if text}
    literals = {name: f"{{{{ {written[name]} }}}}" if name in written else "" for name in parts}
    # At once: what stands around texts may look like one of these names.
    return re.sub("<([A-Z]+)>", lambda found: literals[found[1]], GO_TEMPLATE.replace("\n", ""))


def _around(chat: Chat, roles: dict[str, str], marks: list[str]) -> list[str]:
    text = chat.prompt_text([{"role": roles[mark], "content": mark} for mark in marks])
    parts = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != marks:
        raise ValueError("its chat template does not write each message once and in order.")
    return parts
