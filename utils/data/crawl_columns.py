"""Tables of comments that are not the crawler's: which column is what, named or guessed, and their records as ours."""

import re
import unicodedata
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
        "评论 内容 文本 正文 留言 回复 comment content text message body",
    ],
    "title": ["视频标题 视频名称 视频名 作品标题 videotitle videoname", "标题 title"],
    "desc": ["视频简介 视频描述 作品简介 videodesc videodescription", "简介 描述 desc description"],
    "parent": ["父评论内容 父评论文本 父评论 上级评论 上级评论内容 被回复评论 被回复内容 被回复的评论 原评论 "
               "parentcomment parentcontent parenttext parentcommentcontent parentcommenttext parent"],
    "comment_id": ["评论id", "评论编号", "commentid", "rpid", "rpidstr", "回复id", "replyid"],
    "parent_comment_id": ["父评论id", "父评论编号", "上级评论id", "父id", "被回复评论id", "parentcommentid",
                          "parentrpid", "parentid", "parentstr"],
    "video_id": ["视频id", "视频编号", "videoid", "aid", "avid", "av号", "av", "oid", "bv号", "视频bv号", "视频bv",
                 "bvid", "bv", "视频链接", "视频地址", "videourl", "videolink", "链接", "url", "link"],
    "like_count": ["点赞数", "点赞", "评论点赞数", "点赞量", "获赞数", "赞", "likecount", "likes", "like"],
    "user_id": ["用户id", "评论者id", "userid", "uid", "mid", "membermid", "用户名", "用户昵称", "昵称", "评论者",
                "username", "nickname", "uname", "memberuname", "user", "author"],
    "create_time": ["评论时间", "发布时间", "发表时间", "创建时间", "时间", "createtime", "createdat", "ctime",
                    "commenttime", "timestamp", "time", "date", "日期"],
}  # fmt: skip
# Columns of what is no comment below a video.
OTHER_SITES = {"noteid", "awemeid", "dynamicid", "photoid", "questionid", "answerid", "weiboid", "tiebaid", "articleid"}
DANMAKU_NAMES = {"弹幕内容", "弹幕文本", "danmakutext", "danmucontent", "danmakucontent", "danmutext"}

NOTHING = ("", "nan", "none", "null")
TOP = (*NOTHING, "0", "0.0", "-", "无")  # In the place of a comment that is answered.
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?")
TIME = re.compile(r"[0-9]+(\.[0-9]*)?|[0-9]{1,4}[-/.年][0-9]{1,2}[-/.月][0-9]{1,4}.*", re.DOTALL)
# A number that is no id: a comment gets one from what it says, a parent is unknown.
NO_ID = "0e0"
# Shorter numbers are somebody's own count, and mean another comment in another file.
COMMENT_ID_DIGITS = 7

# https://github.com/SocialSisterYi/bilibili-API-collect, docs/misc/bvid_desc.md
BV_TABLE = "FcwAPNKTMug3GV5Lj7EJnHpWsx4tb8haYeviqBz6rkCy12mUSDQX9RdoZf"
BV_XOR = 23442827791579
AV_BITS = 51
BV_NUMBER = re.compile(rf"(?<![0-9A-Za-z])[bB][vV](1[{BV_TABLE}]{{9}})(?![0-9A-Za-z])")
AV_NUMBER = re.compile(r"(?<![0-9A-Za-z])[aA][vV]([0-9]{1,18})(?![0-9A-Za-z])")


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def made_id(text: str) -> str:
    """Makes an id of a text, always the same one, of 18 digits: a number that Bilibili gives to nothing.

    Numbers of videos stay below 2**51, those of comments have 12 digits after 16 years.
    """
    return str(9 * 10**17 + int(md5(text.encode("utf-8", "replace")).hexdigest(), 16) % 10**17)


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
        A number; "" for no id or one that Excel rounded.
    """
    if text.lower() in NOTHING or NUMBER.fullmatch(text):
        return whole_number(text)
    if (found := BV_NUMBER.search(text)) and (av := av_of_bv("BV" + found[1])) is not None:
        return str(av)
    found = AV_NUMBER.search(text)
    return found[1] if found else made_id(f"video:{text}")


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
    shown = "progress" in names and names & {"mode", "fontsize", "midhash", "color"}
    return bool(shown or "midhash" in names or names & DANMAKU_NAMES)


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
        Our names -> the table's; or why it is no table of comments or of videos; "danmaku" for bullet comments.
    """
    values = {name: [text for record in sample if (text := cell(record, name))] for name in columns}
    numbers = {name for name in columns if values[name] and all(map(NUMBER.fullmatch, values[name]))}
    found = {ours: there for ours, theirs in named.items() if (there := column(columns, theirs))}
    taken = {*found.values()}
    certain = bool(found)
    for ours, tiers in NAMES.items():
        if ours in named and (ours in found or not named[ours]):
            continue
        # Names in lines with others could both be meant; those in lines of their own mean the same.
        for tier in tiers:
            fitting = [
                name
                for name in columns
                if plain(name) in tier.split() and name not in taken and not (ours == "content" and name in numbers)
            ]
            if len(fitting) > 1:
                return f"{ours} may be {' or '.join(fitting)}; say which: --columns '{ours}={escaped(fitting[0])}'"
            if fitting:
                found[ours] = fitting[0]
                taken.add(fitting[0])
                break
    if found.get("parent") in numbers and "parent" not in named:  # The API's "parent" is an id.
        found.setdefault("parent_comment_id", found["parent"])
        del found["parent"]
    if "comment_id" not in found and "comment_id" not in named and "parent_comment_id" in found:
        if own := column(columns, "id"):  # Otherwise it may count anything.
            found["comment_id"] = own
    names = {plain(name) for name in columns}
    if "content" not in found and values.get(bullet := column(columns, "弹幕") or "") and bullet not in numbers:
        return "danmaku"
    about_video = "title" in found or "video_id" in found or has_title
    if "content" in found and about_video and (certain or not names & OTHER_SITES):
        return found
    if "content" not in found and {"video_id", "title"} <= found.keys() and not names & OTHER_SITES:
        return {ours: found[ours] for ours in ("video_id", "title", "desc") if ours in found}
    if "content" in found and not names & OTHER_SITES:
        return (
            f"{found['content']} looks like comments, but no column says of which video (columns: {listed(columns)}); "
            f"give --title 'the title', or name it: --columns 'content={escaped(found['content'])},title=COLUMN'"
        )
    return (
        f"expected the columns of comments or of videos, got {listed(columns)}; if these are comments, say which is "
        "which: --columns 'content=COLUMN,title=COLUMN'"
    )


def escaped(name: str) -> str:
    """A column's name as --columns takes it."""
    return name.replace(",", "\\,")


def listed(columns: list[str], most: int = 12) -> str:
    """Columns for a message."""
    return ", ".join(columns[:most]) + (f" and {len(columns) - most} more" if len(columns) > most else "")


# ---------------------------------------------------------------------------------------------------------------------
# Records


def converted(
    records: Iterable[Record | None], columns: Mapping[str, str], place: str, rounds: bool
) -> Iterator[Kept | None]:
    """Turns a table's records into ours: a comment from each, and before it what it brings along.

    Args:
        records: The table's; None for a torn one.
        columns: Our names -> the table's.
        place: The file and table, within which short ids count.
        rounds: Whether whole numbers may have lost digits on their way, as in a workbook.

    Yields:
        Comments, each video once, and the comments that are answered if their text is in the row; None for a torn one.
    """
    seen = set()
    for record in records:
        if record is None:
            yield None
            continue
        cells = {ours: cell(record, theirs) for ours, theirs in columns.items()}
        if rounds:
            # As xlsx_tables marks the crawler's own ids.
            whole = (ours for ours in ("comment_id", "parent_comment_id", "video_id") if ours in columns)
            cells |= {ours: f"{record[columns[ours]]}.0" for ours in whole if isinstance(record[columns[ours]], int)}
        title = cells.get("title", "")
        video = video_id(cells.get("video_id", "")) or (title_id(title) if title else "")
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
    if answered.lower() not in TOP:
        parent = made_id(f"parent:{video}:{answered}") if parent in ("0", NO_ID) else parent
        yield "parents", {"comment_id": parent, "content": answered}
    likes = cells.get("like_count", "").replace(",", "")
    if thousands := re.fullmatch(r"([0-9.]+) *[万wW]", likes):
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
