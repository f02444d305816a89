"""What a model should not learn from a crawl: repeated texts, bait and answers to it, contact details, echoes, and what
says nothing. Rules in SQL over prepare_data.py's tables; no list of words tells what is bait.
"""

from typing import TYPE_CHECKING, NamedTuple

from utils.data.contacts import CONTACT, MASK, MASKED_NAME, MASKED_NUMBER, NAMES, NUMBERS, SOMEONE

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# In this order: a comment goes for the first of them.
REASONS = {
    "contact": "contact detail or short link (--contacts)",
    "bait": 'bait ("reply and I send it to you"), replies to it, and answers to those (--drop_bait)',
    "echo": "repeats the comment it answers, or the title (--drop_echo)",
    "uploader": "written by the video's author (--drop_uploader)",
    "language": "another language (--language)",
    "few_likes": "too few likes (--min_likes)",
    "too_short": "too short (--min_chars)",
    "too_long": "too long (--max_chars)",
    "emoticons": "nothing but emoticons, as enough others under the video (--max_emoticons)",
    "repeat": "a text that enough others have (--max_repeats)",
    "near_repeat": "nearly a text that enough others have (--max_repeats)",
}

THREAD_REPLIES = 4  # Fewer say little about the comment that they answer.
REQUESTS_PART = 0.3  # Of a thread in requests: other short texts and emoticons are requests, too.
SHORT_CHARS = 2
SAME_PART, SAME_PART_OFFERED = 0.8, 0.6  # Of a thread in two texts; the second where something is offered.
CONTAINED_PART, ADDED_CHARS = 0.75, 4  # Of a thread in one text, with so many characters more.
# A short text that stands in so many threads, and is so large a part of the crawl, recurs all over it.
RECURRING_LETTERS = 8
RECURRING_THREADS = 5
RECURRING_PART = 0.0005
REQUEST_LETTERS, DELIVERY_LETTERS = 20, 12  # The most of a polite request, and of the answer to one.
ECHO_LETTERS = 4  # Shorter ones are words that both use.
ECHO_PART = 0.8  # Of the longer text.
NEAR_LETTERS = 6  # Shorter texts are like each other by chance.

# Words help where how a thread is distributed does not tell: 求 below "who knows this shop?" is no answer to bait.
# Texts of a few of these characters ask for what is offered, those of the first kind alone, too.
ASKING = "求蹲要扣滴踢私戳顶需拉领发已1"
AROUND = "我俺也都还同想给个一份下来吧呀啊呢嘛哦了啦的感谢您你拜托老师学姐哥大佬up主三连关注分享可以看吗急信赞收藏手举d"
POLITE = "[发传给私拉]我|发.{0,2}一份|[能可以想]发|求[发份个私带拉分资链p]|滴我|[来要]一份"
# A comment that asks, wishes or promises something, and one that offers it.
ASKS = (
    "[?？吗呢求]|什么|哪|多少|几|怎么|怎样|啥|谁|如何|是不是|有没有|要不要|能不能|会不会|还是|选|等我|到时|回来|反馈|"
    "还愿|想要|我要|给我|想拥有|出一期|(?i:\\b(?:what|which|who|where|when|how|why)\\b)"
)
OFFERS = (
    "扣|滴[滴我]|私[我信聊发下]|[发传送分]给|发[你您送]|免费|领[取走]|赠送|送[你给]|整理|需要的|(?:^|[^想])要的|想看的|"
    "[需想]?要.{1,4}的(?:举|扣|滴|说|留|评|来|吱|联系|私|同学)|想要的(?:举|扣|滴|说|留|评|来|吱|联系|私|同学)|"
    "评论[区就即]|留[言个]|网盘|打包|自取|无偿|三连|[拿抱]走|戳我|加我|进群|打出|回复|谁[需想]?要|有人要|冒[个泡]|来找我"
)
POLL = "扣.?[1一].*扣.?[2二]"
DELIVERS = "发|私|滴|[洄回][关你]|关[一下注]|已|查收|传|加我|给[你您过]|看[私主后]|[有好]了"

FULL_WIDTH = "".join(map(chr, range(0xFF01, 0xFF5F)))
HALF_WIDTH = "".join(map(chr, range(0x21, 0x7F)))


class Rules(NamedTuple):
    """What goes.

    Attributes:
        max_repeats: So many comments with the same or nearly the same text stay; -1: all.
        contacts: "drop": comments with contact details go; "mask": the details go; "keep".
        drop_bait: Whether bait goes.
        drop_echo: Whether comments go that repeat what they answer.
        max_emoticons: So many comments of nothing but emoticons stay under a video; -1: all.
        min_chars: Fewest letters and digits, of comments that have any.
        max_chars: Most characters; -1: any number.
        min_likes: Fewest likes, of comments whose likes are known.
        drop_uploader: Whether the videos' authors' own comments go.
        language: "zh": half of the letters or more are Chinese; "any".
    """

    max_repeats: int
    contacts: str
    drop_bait: bool
    drop_echo: bool
    max_emoticons: int
    min_chars: int
    max_chars: int
    min_likes: int
    drop_uploader: bool
    language: str


# ---------------------------------------------------------------------------------------------------------------------
# Parts of queries


def sql_text(text: str) -> str:
    """Writes a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def has_contact(column: str) -> str:
    """Writes the SQL that tells whether a text has a contact detail."""
    return f"regexp_matches({column}, {sql_text(CONTACT.pattern)})"


def masked(column: str, contact: str | None = None) -> str:
    """Writes the SQL that masks contact details.

    Args:
        column: With the text.
        contact: Column that tells whether it has any, if that is known.
    """
    without = f"regexp_replace({column}, {sql_text(NAMES)}, {sql_text(MASKED_NAME)}, 'g')"
    for _ in range(2):  # What stands between two numbers belongs to the first match.
        without = f"regexp_replace({without}, {sql_text(NUMBERS)}, {sql_text(MASKED_NUMBER)}, 'g')"
    return f"CASE WHEN {contact or has_contact(column)} THEN {without} ELSE {column} END"


MACROS = rf"""
CREATE MACRO without_emoticons(x) AS
    CASE WHEN contains(x, '[') THEN regexp_replace(x, '\[[^\[\]]{{1,20}}\]', '', 'g') ELSE x END;
-- lower() and translate() are slow, and few texts need them.
CREATE MACRO lower_half_width(x) AS CASE WHEN regexp_matches(x, '[\p{{Lu}}\p{{Lt}}ａ-ｚ]')
    THEN lower(translate(x, {sql_text(FULL_WIDTH)}, {sql_text(HALF_WIDTH)})) ELSE x END;
-- Without what stands for people and contact details.
CREATE MACRO own_words(x) AS CASE WHEN contains(x, '{SOMEONE}') OR contains(x, '{MASK}')
    THEN replace(replace(x, '{SOMEONE}', ''), '{MASK}', '') ELSE x END;
-- What is left of a text without emoticons, digits, punctuation and spaces, of one case and width.
CREATE MACRO fold(x) AS
    lower_half_width(regexp_replace(without_emoticons(own_words(x)), '[^\p{{L}}]+', '', 'g'));
CREATE MACRO digits_of(x) AS regexp_replace(without_emoticons(own_words(x)), '[^\p{{N}}]+', '', 'g');
-- One letter or digit again and again: laughter. However often, it is the same text.
CREATE MACRO is_laughter(x) AS length(x) >= 2 AND left(x, 1) = right(x, 1) AND replace(x, left(x, 1), '') = '';
-- Letters and digits: as many as there are letters, where those are enough.
CREATE MACRO said_chars(x, letters, enough) AS CASE WHEN length(letters) >= greatest(enough, 1) THEN length(letters)
    ELSE length(letters) + length(digits_of(x)) END;
-- What tells texts of a thread apart: letters, and a short text's digits.
CREATE MACRO said_of(x, letters) AS
    CASE WHEN length(letters) <= {RECURRING_LETTERS} THEN letters || digits_of(x) ELSE letters END;
CREATE MACRO is_request(x) AS CASE WHEN length(x) <= {RECURRING_LETTERS}
        AND regexp_matches(x, '^[{ASKING}{AROUND}]*[{ASKING}][{ASKING}{AROUND}]*$|^d{{2,}}$') THEN true
    ELSE length(x) <= {REQUEST_LETTERS} AND regexp_matches(x, '{POLITE}') END;
CREATE MACRO offers(x) AS regexp_matches(x, '{OFFERS}') AND NOT regexp_matches(x, '{POLL}');
CREATE MACRO asks(x) AS NOT offers(x) AND regexp_matches(x, '{ASKS}|{POLL}');
CREATE MACRO is_echo(x, y) AS length(x) >= {ECHO_LETTERS} AND length(y) >= {ECHO_LETTERS}
    AND least(length(x), length(y)) >= {ECHO_PART} * greatest(length(x), length(y))
    AND (contains(x, y) OR contains(y, x));
"""


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def reasons(rules: Rules) -> str:
    """Writes the SQL that finds why a comment goes, as cases of a query.

    Its tables are `c`, the comment, and `p`, the one that it answers (text, letters, contact, likes, author), `v`, its
    video (title, folded; author), and `bait` (id).
    """
    said = f"said_chars(c.text, c.letters, {rules.min_chars})"
    return f"""
        WHEN c.contact AND {rules.contacts == "drop"} THEN 'contact'
        WHEN bait.id IS NOT NULL THEN 'bait'
        WHEN {rules.drop_echo} AND (is_echo(c.letters, p.letters) OR is_echo(c.letters, v.title)) THEN 'echo'
        WHEN {rules.drop_uploader} AND c.author = v.author THEN 'uploader'
        WHEN {rules.language == "zh"} AND 2 * length(regexp_replace(c.letters, '[^\\p{{Han}}]+', '', 'g'))
            < length(c.letters) THEN 'language'
        WHEN c.likes < {rules.min_likes} THEN 'few_likes'
        WHEN {said} BETWEEN 1 AND {rules.min_chars} - 1 THEN 'too_short'
        WHEN {rules.max_chars} >= 0 AND length(c.text) > {rules.max_chars} THEN 'too_long'"""


def find_bait(con: "DuckDBPyConnection") -> None:
    """Finds bait by its replies; leaves `bait` (id).

    Most of them ask for something in few words ("求", "我也要一份"); or most are two texts. Where a third are of the
    first kind, other texts of one or two characters count as such, and emoticons. Elsewhere these are not counted, as
    laughter is not: they are below any good joke, and short texts that differ are answers. Below a comment that offers
    something, what is said all over the crawl counts, too, and one text with a few characters more. What is said below
    a question or a wish is an answer or another's wish, unless it is long.

    All that is said below bait goes with it, and so do deliveries to requests elsewhere: the rest of such a thread may
    not have been crawled.
    """
    con.execute(f"""
        CREATE TABLE recurring AS SELECT letters FROM comments WHERE length(letters) BETWEEN 1 AND {RECURRING_LETTERS}
            AND NOT is_laughter(letters)
            GROUP BY letters HAVING count(DISTINCT (video, parent)) >= {RECURRING_THREADS}
                AND count(*) >= {RECURRING_PART} * (SELECT count(*) FROM comments);
        CREATE TABLE replies AS
            SELECT parent, said, n, recurs, is_request(said) request, length(said) <= {SHORT_CHARS} short FROM (
                SELECT c.parent, said_of(c.text, c.letters) said, count(*) n,
                    bool_or(r.letters IS NOT NULL AND said = c.letters) recurs
                FROM comments c LEFT JOIN recurring r USING (letters)
                WHERE c.parent IN (SELECT parent FROM comments WHERE parent NOT IN (0, id)
                        GROUP BY parent HAVING count(*) >= {THREAD_REPLIES})
                    AND c.parent <> c.id AND NOT (c.letters = '' AND contains(c.text, '{SOMEONE}'))
                GROUP BY c.parent, said)
            WHERE request OR NOT is_laughter(said) OR said = '谢谢';
        CREATE TABLE threads AS
            SELECT parent, asks, offers, coalesce(sum(n) FILTER (said <> ''), 0) n,
                coalesce(sum(n) FILTER (said = ''), 0) faces, coalesce(sum(n) FILTER (empty), 0) empty,
                coalesce(sum(n) FILTER (short AND said <> '' AND NOT empty), 0) short
            FROM (SELECT replies.*, asks, offers, NOT asks AND (request OR recurs AND offers) empty
                FROM replies JOIN (
                    SELECT id, asks(text) asks, offers(text) offers FROM comments
                    WHERE id IN (SELECT parent FROM replies GROUP BY parent HAVING sum(n) >= {THREAD_REPLIES})) p
                    ON p.id = replies.parent)
            GROUP BY parent, asks, offers;
        CREATE TABLE texts AS
            SELECT parent, offers, said, replies.n, threads.n of FROM replies JOIN threads USING (parent)
            WHERE said <> '' AND threads.n >= {THREAD_REPLIES} AND NOT (asks AND length(said) <= {RECURRING_LETTERS});
        CREATE TABLE found AS
            SELECT parent id FROM threads
                WHERE empty >= {REQUESTS_PART} * n AND empty > 0 AND 2 * (empty + short + faces) > n + faces
            UNION SELECT parent FROM texts GROUP BY parent, offers, texts.of
                HAVING count(*) < texts.of / 2 AND list_sum(max(n, 2)) >
                    CASE WHEN offers THEN {SAME_PART_OFFERED} ELSE {SAME_PART} END * texts.of
            UNION SELECT part.parent FROM texts part JOIN texts whole USING (parent)
                WHERE part.offers AND length(part.said) BETWEEN 2 AND {RECURRING_LETTERS}
                    AND contains(whole.said, part.said) AND length(whole.said) <= length(part.said) + {ADDED_CHARS}
                GROUP BY part.parent, part.said, part.of HAVING sum(whole.n) > {CONTAINED_PART} * part.of;
        CREATE TABLE bait AS
            WITH RECURSIVE below AS (
                FROM found UNION SELECT comments.id FROM comments JOIN below ON comments.parent = below.id)
            FROM below;
        INSERT INTO bait
            SELECT c.id FROM comments c JOIN comments p ON p.id = c.parent LEFT JOIN bait ON bait.id = c.id
            WHERE bait.id IS NULL AND length(p.letters) <= {RECURRING_LETTERS}
                AND length(c.letters) <= {DELIVERY_LETTERS} AND regexp_matches(c.letters, '{DELIVERS}')
                AND CASE WHEN p.letters = '' THEN regexp_matches(p.text, '\\[[^\\]]*[蹲求]|^1+$')
                    ELSE is_request(p.letters) OR starts_with(p.letters, '蹲') END;
        DROP TABLE recurring; DROP TABLE replies; DROP TABLE threads; DROP TABLE texts; DROP TABLE found;
    """)


def cap(con: "DuckDBPyConnection", rules: Rules) -> None:
    """Gives a reason to comments of which there are enough others; the better liked ones stay.

    Args:
        con: With the tables `comments` and `verdicts` (id, position, reason).
        rules: How many are enough.
    """
    left = "FROM verdicts JOIN comments USING (id) WHERE reason IS NULL"
    said = "said_chars(text, letters, 1)"
    if rules.max_emoticons >= 0:
        con.execute(f"""
            UPDATE verdicts SET reason = 'emoticons' WHERE id IN (
                SELECT id {left} AND letters = '' AND {said} = 0
                QUALIFY row_number() OVER (PARTITION BY video ORDER BY likes DESC NULLS LAST, id)
                    > {rules.max_emoticons})""")
    if rules.max_repeats < 0:
        return
    # Without letters a text is its digits, whichever they are, or its emoticons.
    con.execute(f"""
        CREATE TABLE same AS SELECT id, likes,
            hash(CASE WHEN is_laughter(letters) THEN left(letters, 1) || left(letters, 1)
                WHEN letters <> '' THEN letters WHEN {said} > 0 THEN '0' ELSE text END) folded {left};
        UPDATE verdicts SET reason = 'repeat' WHERE id IN (
            SELECT id FROM same SEMI JOIN (
                SELECT folded FROM same GROUP BY folded HAVING count(*) > {rules.max_repeats}) often USING (folded)
            QUALIFY row_number() OVER (PARTITION BY folded ORDER BY likes DESC NULLS LAST, id) > {rules.max_repeats});
        DROP TABLE same;
        CREATE TABLE texts AS
            SELECT id, letters {left} AND length(letters) >= {NEAR_LETTERS} AND NOT is_laughter(letters)
            ORDER BY likes DESC NULLS LAST, id""")
    from utils.data.near_repeats import near_repeats  # NumPy takes its time.

    found = near_repeats(con, rules.max_repeats)
    near = "SELECT id FROM texts WHERE rowid IN (SELECT unnest($1))"
    con.execute(f"UPDATE verdicts SET reason = 'near_repeat' WHERE id IN ({near})", [found])
    con.execute("DROP TABLE texts")
