"""Tables of comments that are not the crawler's: which column is what, named or guessed, and their records as ours."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import md5
from typing import Any

Record = dict[str, Any]
# A record with the kind of table that it belongs in: comments, videos, parents (comments that are only answered).
Kept = tuple[str, Record]

# What the columns are called, in lower case without spaces and punctuation. The first line that fits counts; two
# columns of one line could both be meant, and then nothing is guessed.
NAMES = {
    "content": [
        "评论内容 评论文本 评论正文 评论文字 回复内容 留言内容 commenttext commentcontent commentbody contentmessage",
        "评论 内容 文本 正文 留言 comment content text message body",
    ],
    "title": ["视频标题 视频名称 视频名 作品标题 videotitle videoname", "标题 title"],
    "desc": ["视频简介 视频描述 作品简介 videodesc videodescription", "简介 描述 desc description"],
    "parent": ["父评论内容 父评论文本 父评论 上级评论 上级评论内容 被回复评论 被回复内容 被回复的评论 原评论 "
               "parentcomment parentcontent parenttext parentcommentcontent parentcommenttext parent"],
    "comment_id": ["评论id", "评论编号", "commentid", "rpid", "rpidstr", "回复id", "replyid"],
    "parent_comment_id": ["父评论id", "父评论编号", "上级评论id", "父id", "被回复评论id", "parentcommentid",
                          "parentrpid", "parentid", "parentstr"],
    "bvid": ["bv号", "视频bv号", "视频bv", "bvid", "bv"],
    "video_id": ["aid", "avid", "av号", "av", "oid", "视频id", "视频编号", "videoid"],
    "video_url": ["视频链接", "视频地址", "videourl", "videolink", "链接", "url", "link"],
    "like_count": ["点赞数", "点赞", "评论点赞数", "点赞量", "获赞数", "赞", "likecount", "likes", "like"],
    "user_id": ["用户id", "评论者id", "userid", "uid", "mid", "membermid", "用户名", "用户昵称", "昵称", "评论者",
                "username", "nickname", "uname", "memberuname", "user", "author"],
    "create_time": ["评论时间", "发布时间", "发表时间", "创建时间", "时间", "createtime", "createdat", "ctime",
                    "commenttime", "timestamp", "time", "date", "日期"],
}  # fmt: skip
# What says of which video a row is, the surest first.
VIDEO_IDS = ("bvid", "video_id", "video_url")
# Names of any text; only with one of the signs beside them is it taken for comments.
ANY_TEXT = {*"内容 文本 正文 content text message body".split()}
SIGNS = {"comment_id", "parent_comment_id", "parent", "like_count", "user_id", *VIDEO_IDS}
# Columns of what is no comment below a video.
OTHER_SITES = {*"noteid awemeid dynamicid photoid questionid answerid weiboid tiebaid articleid contentid role".split(),
               *"笔记id 笔记标题 笔记链接 微博id 帖子id 帖子标题 问题id 回答id 文章id 文章标题".split()}  # fmt: skip
OTHER_HOST = re.compile(r"https?://(?!([\w-]+\.)*(bilibili\.com|b23\.tv|hdslb\.com)([/:?#]|$))([\w.-]+)", re.ASCII)
DANMAKU_NAMES = {*"弹幕内容 弹幕文本 发送者hash danmakutext danmucontent danmakucontent danmutext midhash".split()}
DANMAKU_LOOKS = {"progress", "mode", "fontsize", "color"}
NO_COMMENTS = "expected the columns of comments or of videos"

NOTHING = ("", "nan", "none", "null")
TOP = (*NOTHING, "0", "0.0", "-", "无")  # In the place of a comment that is answered.
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?")
COUNT = re.compile(r"[0-9][0-9.,]*([eE]\+?[0-9]+)?\s*[万千亿wWkK]?\+?\s*([条个次]\w*)?")  # 1.2万, 1,234, 3条回复
TIME = re.compile(r"[0-9]+(\.[0-9]*)?|[0-9]{1,4}[-/.年][0-9]{1,2}[-/.月][0-9]{1,4}.*", re.DOTALL)
# A number that is no id: a comment gets one from what it says, a parent is unknown.
NO_ID = "0e0"
# Shorter numbers are somebody's own count, and mean another comment in another file.
COMMENT_ID_DIGITS = 7
BELOW_VIDEO = "1"  # Among the API's types of what comments stand below.
VIDEO_ID_DIGITS = 6  # In 2011 av numbers got so long.
MADE = 9 * 10**17

# https://github.com/SocialSisterYi/bilibili-API-collect, docs/misc/bvid_desc.md
BV_TABLE = "FcwAPNKTMug3GV5Lj7EJnHpWsx4tb8haYeviqBz6rkCy12mUSDQX9RdoZf"
BV_XOR = 23442827791579
AV_BITS = 51
BV_NUMBER = re.compile(rf"(?<![0-9A-Za-z])[bB][vV](1[{BV_TABLE}]{{9}})(?![0-9A-Za-z])")
AV_NUMBER = re.compile(r"(?<![0-9A-Za-z])[aA][vV]([0-9]{1,18})(?![0-9A-Za-z])")
EPISODE = re.compile(r"bangumi/play/ep[0-9]+|b23\.tv/\w+", re.ASCII)


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def made_id(text: str) -> str:
    """Makes an id of a text, always the same one, of 18 digits: a number that Bilibili gives to nothing.

    Numbers of videos stay below 2**51, those of comments have 12 digits after 16 years.
    """
    return str(MADE + int(md5(text.encode("utf-8", "replace")).hexdigest(), 16) % 10**17)


def title_id(title: str) -> str:
    """The id of a video of which only the title is known."""
    return made_id("title:" + " ".join(title.split()))


def av_of_bv(bv: str) -> int | None:
    """Turns the BV number of a video ("BV17x411w7KC") into its av number; None if it is none."""
    characters = list(bv[2:])
    for one, other in ((1, 7), (2, 5)):
        characters[one], characters[other] = characters[other], characters[one]
    number = 0
    for character in characters[1:]:
        number = number * len(BV_TABLE) + BV_TABLE.index(character)
    # The highest bit marks a BV number, those below are the av number.
    return (number & ((1 << AV_BITS) - 1)) ^ BV_XOR if number >> AV_BITS == 1 else None


def whole_number(text: str) -> str:
    """A number without ".0"; "" for other texts and for what Excel rounded: 2.28539E+11, 228539000000.0."""
    found = re.fullmatch(r"([0-9]{1,18})(\.0*)?", text)
    return "" if not found or (found[2] and found[1].endswith("00000")) else found[1]


def video_id(text: str) -> str:
    """The av number that a number, a BV number or an address of a video stands for; of other texts an id that is made.

    Returns:
        A number; "" for no id, one that Excel rounded, or an address that is no video's.
    """
    if text.lower() in NOTHING or NUMBER.fullmatch(text):
        return whole_number(text)
    if (found := BV_NUMBER.search(text)) and (av := av_of_bv("BV" + found[1])) is not None:
        return str(av)
    if found := AV_NUMBER.search(text):
        return found[1]
    if "/" in text:  # What follows in an address may be another one each time.
        return made_id(f"video:{found[0]}") if (found := EPISODE.search(text)) else ""
    return made_id(f"video:{text}")


def video_of(cells: Mapping[str, str], by_title: bool) -> str:
    """The id of a row's video: Bilibili's, or else somebody's own number or the title's.

    Args:
        cells: The row by our names.
        by_title: Whether the title goes before somebody's own number, which means another video in another file.

    Returns:
        A number; "" for none.
    """
    own, title = "", cells.get("title", "")
    for text in (cells.get(name, "") for name in VIDEO_IDS):
        number = video_id(text)
        short, made = len(number) < VIDEO_ID_DIGITS, int(number or 0) >= MADE
        if number and not (short if NUMBER.fullmatch(text) else made and "/" not in text):
            return number
        own = own or number
    return title_id(title) if title and (by_title or not own) else own


def comment_id(text: str, place: str) -> str:
    """A comment's id as a number: Bilibili's own, or one that is made and counts within its file only.

    Returns:
        A number; NO_ID for none, and for one that Excel rounded.
    """
    if text.lower() in NOTHING or (number := whole_number(text)) == "" and NUMBER.fullmatch(text):
        return NO_ID
    return number if len(number) >= COMMENT_ID_DIGITS else made_id(f"comment:{place}:{number or text}")


# ---------------------------------------------------------------------------------------------------------------------
# Which column is what


def plain(name: str) -> str:
    """A column's name without what people write differently: case, width, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name)).casefold()


def column(columns: Iterable[str], name: str) -> str | None:
    """Finds a column by its name, or by nearly its name."""
    columns = list(columns)
    return name if name in columns else next((one for one in columns if plain(one) == plain(name) != ""), None)


def cell(record: Record, name: str | None) -> str:
    """A cell's text, without the spaces around it; "" for none."""
    value = record.get(name) if name is not None else None
    if value is None or value != value:  # NaN
        return ""
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def is_danmaku(columns: Iterable[str]) -> bool:
    """Tells bullet comments by their columns: where and how the picture shows them."""
    names = {plain(name) for name in columns}
    shown = names & DANMAKU_LOOKS
    return bool(len(shown) > 1 and shown & {"mode", "fontsize"} or names & DANMAKU_NAMES)


def nested(sample: list[Record]) -> list[str]:
    """The columns of lists and objects."""
    cells = (cell for record in sample for cell in record.items())
    return list(dict.fromkeys(name for name, value in cells if value and isinstance(value, dict | list)))


def recognised(
    sample: list[Record], columns: list[str], named: Mapping[str, str], has_title: bool
) -> dict[str, str] | str:
    """Finds out which column is what.

    Args:
        sample: The table's first records.
        columns: Its columns.
        named: What --columns says; columns that this table does not have are left out.
        has_title: Whether --title says what comments without a video are about.

    Returns:
        Our names -> the table's, and "type" where it says what the comments stand below; or why it is no table of
        comments or of videos, NO_COMMENTS and more if nothing looks like comments; "danmaku" for bullet comments.
    """
    values = {name: [text for record in sample if (text := cell(record, name))] for name in columns}
    counts = {name for name in columns if values[name] and all(map(is_count, values[name]))}
    inner = nested(sample)
    found = {ours: there for ours, theirs in named.items() if (there := column(columns, theirs))}
    if objects := [name for name in found.values() if name in inner]:
        return f"--columns: {objects[0]} holds lists or objects, expected texts"
    certain = "content" in found
    names = {plain(name): name for name in columns}
    no_texts = f" ({listed(inner)}: no texts, but lists or objects)" if inner else ""
    unlike = (
        f"{NO_COMMENTS}, got {listed(columns)}{no_texts}; if these are comments, say which is which: "
        "--columns 'content=COLUMN,title=COLUMN'"
    )
    if not certain and names.keys() & OTHER_SITES:
        return unlike
    if question := guess(found, named, {name: values[name] for name in columns if name not in inner}, counts):
        return question
    if "content" in found:
        # A comment of the API stands below what its type says.
        below = {"type": names["type"]} if {"oid", "type"} <= names.keys() else {}
        return objection(found, values, certain, has_title) or found | below
    if "title" in found and found.keys() & {*VIDEO_IDS}:
        return {ours: found[ours] for ours in (*VIDEO_IDS, "title", "desc") if ours in found}
    bullets = column(columns, "弹幕")
    if bullets is not None and values[bullets] and bullets not in counts:
        return "danmaku"
    if numbers := [name for name in counts if plain(name) in NAMES["content"][0].split()]:
        say = f"--columns 'content={escaped(numbers[0])}'"
        return f"{numbers[0]} holds nothing but numbers; if these are comments: {say}"
    return unlike


def objection(found: Mapping[str, str], values: Mapping[str, list[str]], certain: bool, has_title: bool) -> str:
    """Says why what looks like comments is not taken for any; "" if it is.

    Args:
        found: Our names -> the table's, with `content`.
        values: The table's columns with their first texts.
        certain: Whether --columns says what the comments are; then only their video may be missing.
        has_title: Whether --title says what comments without a video are about.
    """
    content, title, columns = found["content"], found.get("title"), listed([*values])
    needed = "" if title is None and has_title else f",title={'COLUMN' if title is None else escaped(title)}"
    say = f"--columns 'content={escaped(content)}{needed}'"
    if not certain:
        for name, texts in values.items():
            link = plain(name).endswith(("链接", "网址", "url", "link")) and texts
            if link and all(map(OTHER_HOST.match, texts)):
                host = OTHER_HOST.match(texts[0])[4]
                return f"{name} leads to {host}, not to Bilibili; if these are comments below videos: {say}"
        signs = {ours for ours in SIGNS & found.keys() if plain(found[ours]) != "author"}  # Articles have one too.
        if plain(content) in ANY_TEXT and not signs:
            return f"{content} may be any text: no other column tells comments (columns: {columns}); if it is: {say}"
    if found.keys() & {*VIDEO_IDS, "title"} or has_title:
        return ""
    return (
        f"{content} looks like comments, but no column says of which video (columns: {columns}); give --title 'the "
        f"title', or name it: {say}"
    )


def guess(
    found: dict[str, str], named: Mapping[str, str], values: Mapping[str, list[str]], counts: set[str]
) -> str:
    """Adds the columns that are not named to those that are.

    Args:
        found: Our names -> the table's; gets what is guessed.
        named: What --columns says.
        values: Texts of the columns that may be guessed.
        counts: Columns of nothing but numbers.

    Returns:
        What is to be asked; "" for nothing.
    """
    taken = {*found.values()}
    settled = {ours for ours in named if ours in found or not named[ours]}
    for ours, tiers in NAMES.items():
        if ours in settled or ours in VIDEO_IDS and "video_id" in settled:
            continue
        # Names in lines with others could both be meant; those in lines of their own mean the same.
        for tier in tiers:
            fitting = [
                name
                for name, texts in values.items()
                if plain(name) in tier.split()
                and name not in taken
                and not (ours == "content" and (name in counts or tier is tiers[-1] and repeats(texts)))
            ]
            if len(fitting) > 1:
                return f"{ours} may be {' or '.join(fitting)}; say which: --columns '{ours}={escaped(fitting[0])}'"
            if fitting:
                found[ours] = fitting[0]
                taken.add(fitting[0])
                break
    if "video_url" in found and "video_url" not in named and not any(map(video_id, values[found["video_url"]])):
        del found["video_url"]
    if "comment_id" not in found and "comment_id" not in named and "parent_comment_id" in found:
        if own := column(values, "id"):  # Otherwise it may count anything.
            found["comment_id"] = own
    if (parent := found.get("parent")) is None or "parent" in named:
        return ""
    answered = [text for text in values[parent] if text.lower() not in TOP]
    bare = plain(parent) == "parent"
    if all(map(NUMBER.fullmatch, answered)) and (answered or bare):  # The API's "parent" is an id.
        found.setdefault("parent_comment_id", found.pop("parent"))
    elif bare or {*answered} & {*values.get(found.get("user_id"), ())}:
        return (
            f"{parent} may be what is answered, or who; if it is the text: --columns 'parent={escaped(parent)}', "
            "otherwise: --columns 'parent='"
        )
    return ""


def repeats(texts: list[str]) -> bool:
    """Tells a few words again and again, which are no comments."""
    return len({*texts}) <= 3 and len(texts) >= 10


def is_count(text: str) -> bool:
    """Tells numbers, and what stands for none."""
    return text.lower() in TOP or COUNT.fullmatch(text) is not None


def escaped(name: str) -> str:
    """A column's name as --columns takes it."""
    return name.replace(",", "\\,")


def listed(columns: list[str], most: int = 12) -> str:
    """Columns for a message."""
    return ", ".join(columns[:most]) + (f" and {len(columns) - most} more" if len(columns) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Records


def converted(
    records: Iterable[Record | None], columns: Mapping[str, str], place: str, rounds: bool, left_out: Counter[str]
) -> Iterator[Kept | None]:
    """Turns a table's records into ours: a comment from each, and before it what it brings along.

    Args:
        records: The table's; None for a torn one.
        columns: Our names -> the table's.
        place: The file and table, within which short ids count.
        rounds: Whether whole numbers may have lost digits on their way, as in a workbook.
        left_out: Counts the comments that stand below no video, by type.

    Yields:
        Comments, each video once, and the comments that are answered if their text is in the row; None for a torn one.
    """
    seen = set()
    for record in records:
        if record is None:
            yield None
            continue
        cells = {ours: cell(record, theirs) for ours, theirs in columns.items()}
        if (below := cells.get("type", "").removesuffix(".0")) not in ("", BELOW_VIDEO):
            left_out[below] += 1
            continue
        if rounds:
            # As xlsx_tables marks the crawler's own ids.
            whole = (ours for ours in ("comment_id", "parent_comment_id", "video_id") if ours in columns)
            cells |= {ours: f"{id}.0" for ours in whole if isinstance(id := record.get(columns[ours]), int)}
        title, video = cells.get("title", ""), video_of(cells, "content" in columns)
        if title and video not in seen:
            seen.add(video)
            yield "videos", {"video_id": video, "title": title, "desc": cells.get("desc", "")}
        if "content" in columns:
            yield from comment(cells, video, place)


def comment(cells: Mapping[str, str], video: str, place: str) -> Iterator[Kept]:
    """A comment, behind the one that it answers if that one's text is in the row."""
    parent = cells.get("parent_comment_id", "")
    parent = "0" if parent.lower() in TOP else comment_id(parent, place)
    answered = cells.get("parent", "")
    if NUMBER.fullmatch(answered) and len(whole_number(answered)) >= COMMENT_ID_DIGITS:  # an id among texts
        parent, answered = comment_id(answered, place), ""
    if answered.lower() not in TOP:
        parent = made_id(f"parent:{video}:{answered}") if parent in ("0", NO_ID) else parent
        yield "parents", {"comment_id": parent, "content": answered}
    likes = cells.get("like_count", "").replace(",", "")
    if thousands := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *[万wW]", likes):
        likes = str(round(float(thousands[1]) * 10_000))
    time = cells.get("create_time", "")
    yield "comments", {
        "comment_id": comment_id(cells.get("comment_id", ""), place),
        "parent_comment_id": parent,
        "video_id": video,
        "content": cells["content"],
        "create_time": time if TIME.fullmatch(time) else "",  # Others would make a row of the crawler's a torn one.
        "like_count": likes,
        "user_id": cells.get("user_id", ""),
    }
