"""utils/data/cleaning.py, contacts.py, near_repeats.py, and prepare_data.py with them.

python -m pytest tests/test_utils_data_cleaning.py
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_prepare_data import Record, answer, comment, prepare, prompt, quick_plot, video, write_json  # noqa: F401

from utils.data import near_repeats
from utils.data.cleaning import MACROS, REASONS, has_contact, masked
from utils.data.contacts import MASK, NAMES, NUMBERS
from utils.data.near_repeats import alike, are_near, fingerprints, grouped, pairs_of


@pytest.fixture(scope="module")
def con() -> Iterator[Any]:
    import duckdb

    with duckdb.connect() as con:
        con.execute(MACROS)
        yield con


def crawl(folder: Path, comments: list[Record], videos: int = 1, **fields: Any) -> Path:
    """Writes a crawl."""
    write_json(folder / "crawl/x_contents.json", [video(number, **fields) for number in range(videos)])
    write_json(folder / "crawl/x_comments.json", comments)
    return folder / "crawl"


def said(texts: list[str], first: int = 1, **fields: Any) -> list[Record]:
    """Comments with these texts."""
    return [comment(first + number, content=text, **fields) for number, text in enumerate(texts)]


def kept(folder: Path, *options: str) -> tuple[list[str], dict[str, int]]:
    """What is left of a crawl, and how many comments go for which of the rules."""
    written, report = prepare(folder, "--clean", "True", *options)
    return [answer(record) for record in written.values()], {
        reason: count for reason, count in report["dropped"].items() if count and reason in REASONS
    }


# ---------------------------------------------------------------------------------------------------------------------
# Contact details

CONTACTS = [
    "想要的加薇 zq77lm90", "裙：五六三三零八一九", "扣 9 8 7 6 5 4 3 2 1", "QQ：７６５４３２１",
    "我的微信是 li_na_66", "加v tingting", "电话 139 8765 4321", "13987654321", "群号 745812309",
    "发到 someone.else@163.com", "https://b23.tv/Zz9yX8w", "主页 space.bilibili.com/7654321", "UID:345678901",
    "扣扣9八7六5四3", "VX: 7mn8opqrs", "745812309 进来聊", "加我V信 k9j8h7", "🐧 87654321", "车友君羊 745-812-309",
    "热线：０１０－８７６５４３２１", "加卫星 qw12er34", "➕薇：abcd_1234", "t.cn/A6xyz12", "wei xin: hello2026abc",
    "一三九八七六五四三二一", "QQ①②③④⑤⑥⑦⑧", "拨打13987654321分享", "13987654321人工服务", "+8613987654321",
    "0755-87654321", "微❤信 abc12345", "薇芯：lily2020", "徽信 abc12345", "微 信 号 abc12345", "微信号是 lisi99",
    "微信搜 abcd8888", "微信ID：tom_1990", "v心 lily2020", "维❤ lily2020", "加我微信 lilywang", "绿泡泡 abc12345",
    "QQ同号 7654321", "7654321@qq。com", "7654321艾特qq点com", "lily(at)163.com", "uid345678901",
    "https://jq.qq.com/?k=abc", "bili22.cn/abc",
    "QQ群：745812309", "进QQ群 745812309", "q群：745812309", "2群：745812309", "加q 745812309", "图在这 Q：745812309",
    "联系Q 7654321", "QQ群号745812309", "抠抠 7654321", "找我 微:lily2026", "微lily2026", "卫星：lily2026",
    "+V：lilywang", "139.8765.4321", "139，8765，4321", "①③⑨⑧⑦⑥⑤④③②①",
    "1️⃣3️⃣9️⃣8️⃣7️⃣6️⃣5️⃣4️⃣3️⃣2️⃣1️⃣", "壹叁玖 捌柒陆伍 肆叁贰壹",
    "745812309 扣扣", "745812309这是群号", "745812309（裙）", "我的id是34567890", "bilibili.com/space/34567",
    "抖音号：34567890",
    "b23点tv/AbCdEf", "https://pan.quark.cn/s/0f1e2d3c", "pan.baidu.com/s/1abc",
    "微信 lilywangwang", "vx tingtingli", "薇 lilywang", "V abc98765", "交流群①：745812309", "群2：745812309",
    "7458123（裙）", "薇 x y 9 8 7", "QQ⁷⁶⁵⁴³²¹", "QQ 𝟕𝟔𝟓𝟒𝟑𝟐𝟏", "公众号：小张说车", "公粽号「小张说车」",
    "Q 745812309", "q745812309", "745812309 学习群", "745812309，备注昵称", "要的加745812309", "【群】745812309",
    "抖音号：xiaoli886", "小红书搜xiaoli886", "溦信 lily2020", "加我微❤️：lily_66", "wei信：lily2020", "v-x lily2020",
    "ＶＸ：lily2020", "卫星 lily2020", "Q.Q 745812309", "745812309qq邮箱", "lily#qq.com", "￥Ab1Cd2Ef3Gh￥",
    "https://docs.qq.com/doc/AbCd", "kdocs.cn/l/abc",
]  # fmt: skip
NO_CONTACTS = [
    "求链接", "同求，河北的", "蹲一个结果", "加我一份", "2025年10月", "排名45000", "一加13", "微信转账也行",
    "4K@60Hz", "扣8000元", "扣了6分", "群里有人看吗", "2099元", "播放量987654321次", "Model Y 2025款", "QQ音乐",
    "v587", "扣1", "BV1ab411c7xY", "id3 crozz", "手机mate70pro", "13.8万公里", "2025-10-01", "2025/10/01 12:30",
    "rtx5090 32g", "微信群里说", "i9-13900k", "联系客服", "https://www.bilibili.com/video/BV1ab411c7xY", "价格189999",
    "排名23456，分数598", "900000000人", "电话费299", "一二三四五六七", "加微信群", "安卓15 微信8.0.60",
    "1、2、3、4、5、6", "WX 不能用", "3.1415926535", "https://www.zhihu.com/question/345678912/answer/2345678901",
    "安徽48000能上啥", "安徽2024一本线", "300 400 500", "985 211 2012", "比分 98 102 115", "2333333333", "666666666",
    "播放量123456789", "人口1411750000", "光速299792458m/s", "订单号2025010112", "扣1、2、3、4、5", "扣一二三四五",
    "扣20000保证金", "手机 20251001", "手机13 14 15 16", "联系 2025-10-01", "c++ volatile", "加virtual", "+vitaminc",
    "6 @Mr.Li 快来看", "OK@Dr.Li", "2160p@60Hz.HDR", "感光度 400 800 1600 3200", "123456789 加油", "1500000000满意",
    "2000000000 加上利息", "微距100mm", "一群人", "Q3财报", "微软win11", "球球你了",
    "公众号文章里说的", "V神2024", "GTA V 2013", "wechat account", "群1：下午开会", "（裙）12345678件", "微信 8.0.60",
    "微信登录iphone", "x²+y²=z²", "抖音搜得到", "q1到q4", "找我123", "加100块", "￥1299", "卫星发射2025", "Q弹",
]  # fmt: skip


@pytest.mark.parametrize("text", CONTACTS + NO_CONTACTS)
def test_contact_details(con: Any, text: str) -> None:
    """Python's and DuckDB's engine agree; what is masked has none left, and what is none stays as it is."""
    found = text in CONTACTS
    assert bool(re.search(NAMES, text) or re.search(NUMBERS, text)) == found
    assert con.execute(f"SELECT {has_contact('$1::VARCHAR')}", [text]).fetchone()[0] == found
    hidden = con.execute(f"SELECT {masked('x')} FROM (SELECT $1::VARCHAR x)", [f"好的，{text} 谢谢"]).fetchone()[0]
    assert (MASK in hidden and hidden.endswith("谢谢")) if found else hidden == f"好的，{text} 谢谢"
    assert not con.execute(f"SELECT {has_contact('$1::VARCHAR')}", [hidden]).fetchone()[0]


def test_several_contacts_in_one_text(con: Any) -> None:
    text = "13987654321 13987654322，13987654323；a@b.com a@c.com"
    hidden = con.execute(f"SELECT {masked('x')} FROM (SELECT $1 x)", [text]).fetchone()[0]
    assert not re.search(r"\d|@", hidden) and hidden.count(MASK) == 5


def test_contacts_are_dropped_masked_or_kept(tmp_path: Path) -> None:
    """In titles, descriptions and parents they are masked where comments with them are dropped, too."""
    comments = [
        *said(["要资料的加薇 zq77lm90", "这个讲得很清楚"]), *said(["收到，谢谢分享"], 3, parent_comment_id="50001")
    ]  # fmt: skip
    folder = crawl(tmp_path, comments, title="合作联系 QQ 7654321", desc="邮箱 up@example.org 欢迎投稿")
    texts, dropped = kept(folder)
    assert texts == ["这个讲得很清楚", "收到，谢谢分享"] and dropped == {"contact": 1}
    prompts = [prompt(record) for record in prepare(folder, "--clean", "True")[0].values()]
    assert all(f"合作联系 {MASK}" in text and f"邮箱 {MASK} 欢迎投稿" in text for text in prompts)
    assert f"父评论：要资料的{MASK}" in prompts[1]
    texts, dropped = kept(folder, "--contacts", "mask")
    assert texts[0] == f"要资料的{MASK}" and not dropped
    texts, _ = kept(folder, "--contacts", "keep")
    assert texts[0] == "要资料的加薇 zq77lm90"
    assert "QQ 7654321" in prompt(prepare(folder, "--clean", "True", "--contacts", "keep")[0]["50002"])


def test_a_masked_contact_alone_is_no_answer(tmp_path: Path) -> None:
    written, report = prepare(crawl(tmp_path, said(["13987654321", "很好看"])), "--clean", "True", "--contacts", "mask")
    assert [answer(record) for record in written.values()] == ["很好看"] and report["dropped"]["empty"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Repeats


def test_repeats(tmp_path: Path) -> None:
    """Case, width, spaces, punctuation, digits and emoticons make no difference; the better liked ones stay."""
    texts = ["前排", "前排！", " 前 排", "[doge]前排", "前排99", "Ｎｉｃｅ啊", "nice啊", "NICE 啊!", "真不错"]
    likes = [1, 0, 5, 3, 0, 0, 0, 0, 0]
    comments = [record | {"like_count": count} for record, count in zip(said(texts), likes, strict=True)]
    folder = crawl(tmp_path, comments)
    left, dropped = kept(folder)
    assert left == ["前排", "前 排", "[doge]前排", "Ｎｉｃｅ啊", "nice啊", "NICE 啊!", "真不错"]
    assert dropped == {"repeat": 2}
    assert kept(folder, "--max_repeats", "1") == (["前 排", "Ｎｉｃｅ啊", "真不错"], {"repeat": 6})
    assert kept(folder, "--max_repeats", "-1") == ([text.strip() for text in texts], {})


def test_numbers_are_one_text_and_emoticons_are_their_own(tmp_path: Path) -> None:
    texts = ["11", "666", "12 34", "2333", "[doge]", "[doge][doge]", "[妙啊]"]
    left, dropped = kept(crawl(tmp_path, said(texts)), "--max_repeats", "1", "--max_emoticons", "-1")
    assert left == ["11", "[doge]", "[doge][doge]", "[妙啊]"] and dropped == {"repeat": 3}


ADS = [
    "{}车主俱乐部欢迎各位，入会就送{}一份，名额有限先到先得",
    "欢迎各位加入{}车主俱乐部，入会就送{}一份哦，名额有限先到先得",
]
GIFTS = ["脚垫", "钥匙扣", "香薰", "遮阳帘", "收纳盒", "手机支架"]


def test_near_repeats(tmp_path: Path) -> None:
    """Advertisements with small changes are few in the end; comments on one matter in own words all stay."""
    ads = [form.format(car, gift) for form in ADS for car in ("银河", "星途") for gift in GIFTS]
    own = [
        "银河这个车机用了半年没有卡顿过，比我上一辆强多了", "车机卡不卡要看用多久，我的银河一年以后就开始慢了",
        "星途的座椅坐长途腰不疼，这点必须好评", "为什么大家都说座椅好，我坐了两小时腰就受不了",
    ]  # fmt: skip
    left, dropped = kept(crawl(tmp_path, said(ads + own)))
    assert set(own) <= {*left} and len(left) - len(own) <= 6
    assert dropped["near_repeat"] == len(ads) - (len(left) - len(own))
    assert set(kept(tmp_path / "crawl", "--max_repeats", "-1")[0]) == {*ads, *own}


def test_what_is_near() -> None:
    """Pairs of letters counted by hand: of short texts 3 of 5 are to be the same, of longer ones 2 of 5."""
    assert are_near("甲乙丙丁戊", "甲乙丙丁己") and not are_near("甲乙丙丁戊", "甲乙丙己庚")  # 3 of 5, 2 of 6.
    long = "甲乙丙丁戊己庚辛壬癸"  # 9 pairs.
    assert are_near(long, "甲乙丙丁戊己庚子丑寅") and not are_near(long, "甲乙丙丁戊己子丑寅卯")  # 6 of 12, 5 of 13.


def test_what_is_near_with_an_alphabet() -> None:
    """Long texts have most pairs of 26 letters in common, whatever they say; runs of five they have not."""
    assert pairs_of("看abcdef吧") == {"看a", "abcde", "bcdef", "cdef吧", "f吧"} and pairs_of("abcd") == set()
    assert pairs_of("甲乙丙") == {"甲乙", "乙丙"}
    text = re.sub(r"[^a-z]", "", (ROOT / "README.md").read_text(encoding="utf-8").lower())
    parts = [text[start : start + 600] for start in range(0, 12_000, 600)]
    pairs = [jaccard({*pairwise(one)}, {*pairwise(two)}) for one, two in itertools.combinations(parts, 2)]
    assert np.mean(np.array(pairs) > near_repeats.NEAR_PAIRS) > 0.5, "by pairs they would be near"
    assert not any(are_near(one, two) for one, two in itertools.combinations(parts, 2))
    assert are_near(parts[0], parts[0][:300] + "another" + parts[0][310:])
    prints = fingerprints(parts)
    for at, part in enumerate(parts):
        assert (fingerprints([part]).bitmaps[:, 0] == prints.bitmaps[:, at]).all()
    mixed = fingerprints(["abcd", "看abcdef吧", "abcde"]).bitmaps
    assert np.bitwise_count(mixed).sum(0).tolist() == [0, 5, 1]


def jaccard(one: set[Any], two: set[Any]) -> float:
    return len(one & two) / len(one | two)


def test_fingerprints_estimate_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smallest hashes are equal as often as runs are; bitmaps find the pairs that are there. Texts are not mixed up."""
    monkeypatch.setattr(near_repeats, "HASHED_TEXTS", 700)
    draw = random.Random(1)
    alphabet = [chr(code) for code in range(0x4E00, 0x4E00 + 400)]
    pairs = []
    for _ in range(1500):
        text = draw.choices(alphabet, k=24)
        start = draw.randrange(1, 20)
        pairs.append(("".join(text), "".join(text[start:] + draw.choices(alphabet, k=start))))
    texts = [*itertools.chain(*pairs)]
    prints = fingerprints(texts)
    runs = [{*map("".join, zip(*(text[place:] for place in range(4)), strict=False))} for text in texts]
    expected = np.mean([jaccard(runs[at], runs[at + 1]) for at in range(0, len(texts), 2)])
    assert np.mean(prints.hashes[:, ::2] == prints.hashes[:, 1::2]) == pytest.approx(expected, abs=0.02)
    for at in (0, 1, 2, 2999):
        own = {*map("".join, pairwise(texts[at]))}
        bits = int(np.bitwise_count(prints.bitmaps[:, at]).sum())
        assert len(own) - 5 <= bits <= len(own), "a bit a pair, some pairs share one"
        alone = fingerprints([texts[at]])
        assert (alone.hashes[:, 0] == prints.hashes[:, at]).all()
        assert (alone.bitmaps[:, 0] == prints.bitmaps[:, at]).all()


def test_texts_are_paired_with_the_first_of_their_kind() -> None:
    """Of one hash: texts 0, 2, 3, 5 of one kind and 1, 4, 6 of another; 7 has a hash of its own."""
    one, two = (1 << 20) - 1, ((1 << 20) - 1) << 20
    hashes = np.array([9, 9, 9, 9, 9, 9, 9, 1], dtype=np.uint32)
    bitmaps = np.array([[one, two, one, one, two, one, two, one]], dtype=np.uint64)
    assert sorted(alike(hashes, bitmaps).tolist()) == [[2, 0], [3, 0], [4, 1], [5, 0], [6, 1]]
    assert alike(hashes[:0], bitmaps[:, :0]).tolist() == []
    groups = grouped(np.array([[2, 0], [4, 1], [5, 2], [6, 1]]), 8, 2)
    assert [group.tolist() for group in groups] == [[0, 2, 5], [1, 4, 6]]
    assert grouped(np.zeros((0, 2), dtype=np.int64), 8, 2) == []


def edited(text: str, draw: random.Random, letters: list[str]) -> str:
    """A text with one or two letters changed, left out or put in."""
    edits = [*text]
    for _ in range(draw.randrange(1, 3)):
        at = draw.randrange(len(edits))
        edits[at : at + draw.randrange(2)] = draw.choices(letters, k=draw.randrange(2))
    return "".join(edits)


@pytest.mark.parametrize("most", [1, 3])
def test_of_few_texts_that_are_near_so_many_stay(most: int) -> None:
    """Groups of seven edits of one text, among others: what plain comparing of all pairs leaves, in the same order."""
    import duckdb

    draw = random.Random(most)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 300)]
    seeds = ["".join(draw.choices(letters, k=30)) for _ in range(60)]
    texts = [edited(text, draw, letters) for text in seeds for _ in range(7)]
    texts += ["".join(draw.choices(letters, k=30)) for _ in range(300)]
    draw.shuffle(texts)
    stay: list[str] = []
    expected = []
    for number, text in enumerate(texts):
        if sum(are_near(text, one) for one in stay) >= most:
            expected.append(number)
        else:
            stay.append(text)
    with duckdb.connect() as con:
        con.execute("CREATE TABLE texts AS SELECT unnest($1) letters", [texts])
        found = near_repeats.near_repeats(con, most).tolist()
    # Near ones without a hash in common are not compared.
    assert len({*found} & {*expected}) >= 0.98 * len(expected) and len(found) <= len(expected) == 60 * (7 - most)


# ---------------------------------------------------------------------------------------------------------------------
# Bait


def thread(parent: int, replies: list[str], first: int) -> list[Record]:
    """Replies to a comment."""
    return said(replies, first, parent_comment_id=str(50000 + parent))


def test_bait_goes_with_all_below_it(tmp_path: Path) -> None:
    comments = [
        *said(["笔记全整理成一份了，想看的留个言我私下传", "老师讲的第三章我没听懂", "第二题答案是不是错了"]),
        *thread(1, ["想看", "1", "顶", "[打卡]", "麻烦了[比心]"], 10), *thread(10, ["已传，注意查收"], 20),
        *thread(20, ["到了到了，多谢"], 30),
        *thread(2, ["第三章要先看第一章", "我也没懂", "建议配合课本一起看", "顶"], 40),
    ]  # fmt: skip
    left, dropped = kept(crawl(tmp_path, comments))
    assert dropped == {"bait": 8, "too_short": 1}  # "顶" under another comment.
    assert len(left) == len(comments) - 9 and left[0] == "老师讲的第三章我没听懂"
    assert len(kept(tmp_path / "crawl", "--drop_bait", "False", "--min_chars", "0")[0]) == len(comments)


def test_what_is_said_all_over_the_crawl_is_bait(tmp_path: Path) -> None:
    """Six threads of bait teach it: longer texts count that recur, as do the answers to them elsewhere."""
    replies = ["蹲资料包", "同蹲资料包啊", "蹲资料包", "谢谢啦蹲资料包"]
    comments = []
    for number in range(6):
        text = f"第{number}套整理好了要的说一声，内容有{'甲乙丙丁戊己'[number] * 6}"
        comments.append(comment(100 * number + 1, content=text))
        comments += thread(100 * number + 1, replies, 100 * number + 2)
    comments += [comment(900, content="蹲资料包"), *thread(900, ["私信你了哦"], 901)]
    comments += said(["这个老师的声音很好听", "比我们学校老师讲得好"], 950)
    left, dropped = kept(crawl(tmp_path, comments))
    assert left == ["蹲资料包", "这个老师的声音很好听", "比我们学校老师讲得好"] and dropped["bait"] == 31


def test_everyday_words_are_no_bait(tmp_path: Path) -> None:
    """Though they are said all over the crawl."""
    comments = []
    for number in range(8):
        comments.append(comment(100 * number + 1, content=f"第{'甲乙丙丁戊己庚辛'[number]}次模拟考完了"))
        comments += thread(100 * number + 1, ["加油", "恭喜", "厉害", "确实"], 100 * number + 2)
    assert kept(crawl(tmp_path, comments), "--max_repeats", "-1")[1] == {}


def test_equal_replies_are_bait_however_long(tmp_path: Path) -> None:
    """Of one text, or of two; not of many. Laughter, emoticons and mentions are below good jokes, too."""
    parents = ["全套题库在我这里，三连以后评论就行", "一份简历模板，留言发送"]
    comments = said([*parents, "这道菜怎么做才不腥", "猫从沙发上掉下来的声音"])
    comments += thread(1, ["已经三连了求题库"] * 5 + ["已经三连，求题库！"], 10)
    comments += thread(2, ["简历来一份"] * 3 + ["蹲蹲简历吧"] * 3 + ["想知道是不是免费的呀"], 20)
    comments += thread(3, ["放姜和料酒啊", "先焯水再炒", "用啤酒炖就行", "鱼要新鲜才行"], 30)
    comments += thread(4, ["哈哈哈哈", "哈哈", "[笑哭]", "666", "@小王", "哈哈哈哈哈哈哈", "像我下班"], 40)
    left, dropped = kept(crawl(tmp_path, comments))
    assert dropped["bait"] == 15 and left[:2] == ["这道菜怎么做才不腥", "猫从沙发上掉下来的声音"]
    assert {"放姜和料酒啊", "鱼要新鲜才行", "像我下班"} <= {*left}


BAIT = {
    "模板在我网盘里，要的滴滴": ["滴滴", "111", "我也要", "[打call]", "踢我一下啊"],
    "整套讲义都有": ["[蹲蹲]", "[蹲蹲]", "求", "[打call]"],
    "真题我都扫描好啦": ["想要一份", "求一份", "蹲一份", "来一份吧"],
    "要讲义的举手": ["举手", "我举手", "举手举手", "举手啦"],
    "打出口号就发链接给你": ["天天向上", "天天向上！！", "天天向上冲冲", "我要天天向上", "到"],
    "需要的扣1，有人吗？": ["1", "11", "求求了", "1"],
    "讲义免费送": ["求", "蹲", "老师", "看下"],
    "有全套笔记，需要的同学说一声": ["需要", "我需要", "急需", "需要一下", "谢谢"],
    "网课我都录了，要的私": ["求", "学姐可以发我一份吗，下周就考了", "能发我吗", "大佬发我一份吧，谢谢", "1"],
    "关注以后我发你": ["已关注", "已赞", "已三连", "已关注求发"],
    "回复口令领题库": ["口令", "口令谢谢", "求口令", "111口令"],
    "录音要的扣1": ["1", "1", "1", "谢谢"],
}
NO_BAIT = {
    "你们提的是什么颜色": ["白", "黑", "灰色", "蓝", "白", "黑"],
    "大家报一下坐标": ["杭州", "成都", "长沙", "北京", "武汉"],
    "这车是几速的": ["10", "11", "9", "10"],
    "家里几个孩子": ["1", "1", "2", "3"],
    "你们学校排名多少": ["排名33000", "排名41000", "2万3", "3万5", "1万8"],
    "说下名次吧": ["排名33000", "排名41000", "2万3", "3万5", "1万8"],
    "什么时候考试": ["2024年11月", "2024年11月", "2024年12月", "11月"],
    "想从零开始画画": ["我也想", "我也想学", "加油", "我也是"],
    "这配色真好看": ["好看", "真好看", "确实好看", "太好看了"],
    "求推荐一款入门的相机": ["求推荐", "同求，两千以内的", "佳能吧", "蹲一个后续", "看你拍啥"],
    "有没有这首歌的链接": ["同求", "求", "蹲", "蹲一个", "求"],
    "求一家靠谱的修车店，人在洛阳": ["同求", "蹲", "求", "老城那边有一家"],
    "老师求更新下一章": ["求更新", "求", "顶", "同求"],
    "等我考完告诉你们难不难": ["蹲", "蹲一个", "蹲", "加油"],
    "下个月提车，到时候反馈油耗": ["蹲", "蹲后续", "蹲", "求"],
    "要不要上顶配": ["要", "要", "不要", "要"],
    "第三题选B还是D": ["D", "D", "d", "B"],
    "觉得难的扣1，不难的扣2": ["1", "1", "2", "1", "1"],
    "我想要一台这样的车": ["我也想要", "想要", "我也想要", "想要"],
    "发动机声音好大": ["正常", "正常的", "正常吧", "都这样"],
    "第一次做就成功了": ["[点赞]", "厉害", "[doge]", "[星星眼]", "求图"],
}  # fmt: skip


@pytest.mark.parametrize("text", [*BAIT, *NO_BAIT])
def test_threads(tmp_path: Path, text: str) -> None:
    """A crawl that holds this thread alone."""
    comments = [*said([text]), *thread(1, (BAIT | NO_BAIT)[text], 10), comment(99, content="不相干的一条")]
    _, dropped = kept(crawl(tmp_path, comments), "--min_chars", "0", "--max_repeats", "-1", "--max_emoticons", "-1")
    assert dropped == ({"bait": len(comments) - 1} if text in BAIT else {})


def test_answers_to_requests(tmp_path: Path) -> None:
    """What answers a request goes, though nothing else of its thread was crawled; not what answers a question."""
    comments = said(["求", "1", "我也要[保佑]", "求链接", "不是说好了要更新的嘛", "要", "1"])
    answers = ["发你啦", "看私信", "给过你了", "搜索店名就有", "明天晚上就更新", "为啥要，顶配多两万呢",
               "太早了吧，我三点"]  # fmt: skip
    for number, text in enumerate(answers):
        comments += thread(number + 1, [text], 10 + number)
    left, dropped = kept(crawl(tmp_path, comments), "--min_chars", "0")
    assert dropped == {"bait": 3} and left[-4:] == answers[3:]


def test_short_answers_alone_make_no_bait(tmp_path: Path) -> None:
    """Three replies tell nothing; half of them may be short; a comment that is its own parent is no thread."""
    comments = [
        *said(["今天的实验翻车了，录像为证", "猫比人会过日子"]), *thread(1, ["顶", "惨", "好"], 10),
        *thread(2, ["确实", "是啊", "我家的也是，天天睡到中午", "羡慕它不用上班"], 20),
        *said(["好"], 30, parent_comment_id="50030"),
    ]  # fmt: skip
    assert kept(crawl(tmp_path, comments), "--min_chars", "0")[1] == {}


# ---------------------------------------------------------------------------------------------------------------------
# The other rules


def test_laughter_is_one_text(tmp_path: Path) -> None:
    left, dropped = kept(crawl(tmp_path, said(["哈" * count for count in range(2, 12)])))
    assert left == ["哈哈", "哈哈哈", "哈哈哈哈"] and dropped == {"repeat": 7}


def test_a_name_is_no_word_of_ones_own(tmp_path: Path) -> None:
    """Nor is a number in a name that is answered a contact detail."""
    texts = ["@小明 6", "@小明 [doge]", "回复 @vx_abc12345 :说得有道理", "@小明 快看这个"]
    written, report = prepare(crawl(tmp_path, [*said(texts[:2]), *said(texts[2:], 3, parent_comment_id="50009"),
                                               comment(9, content="被回复的一条")]), "--clean", "True")  # fmt: skip
    left = [answer(record) for record in written.values()]
    assert left == ["@某人 [doge]", "说得有道理", "@某人 快看这个", "被回复的一条"]
    assert report["dropped"]["too_short"] == 1


def test_echo(tmp_path: Path) -> None:
    comments = [
        *said(["标题就是这么长的一个标题", "这个方案真的可行吗", "不同意标题里说的"]),
        *thread(2, ["这个方案真的可行吗？？[doge]", "方案可行，我试过", "真的可行吗这个方案",
                    "这个方案真的不行吗"], 10),
    ]  # fmt: skip
    left, dropped = kept(crawl(tmp_path, comments, title="标题就是这么长的一个标题！"))
    assert dropped == {"echo": 2}
    assert left == [
        "这个方案真的可行吗", "不同意标题里说的", "方案可行，我试过", "真的可行吗这个方案", "这个方案真的不行吗",
    ]  # fmt: skip
    assert kept(tmp_path / "crawl", "--drop_echo", "False")[1] == {}
    crawl(tmp_path, comments, title='标题就是<em class="keyword">这么长</em>的一个标题！')
    assert kept(tmp_path / "crawl")[1] == {"echo": 2}, "the marks of a search are no part of a title"


def test_lengths_and_emoticons(tmp_path: Path) -> None:
    faces = ["[doge]", "[笑哭]", "😂😂", "[妙啊][妙啊]", "？？？"]
    texts = ["好", "好！", "好的", "6", "66", "字" * 40, *faces]
    folder = crawl(tmp_path, said(texts))
    left, dropped = kept(folder, "--max_chars", "39")
    assert dropped == {"too_short": 3, "too_long": 1, "emoticons": 2}
    assert left == ["好的", "66", "[doge]", "[笑哭]", "😂😂"]
    assert kept(folder, "--min_chars", "0", "--max_chars", "-1", "--max_emoticons", "-1") == (texts, {})
    assert kept(folder, "--max_emoticons", "0")[0] == ["好的", "66", "字" * 40]


def test_emoticons_are_counted_by_video(tmp_path: Path) -> None:
    comments = said(["[doge]", "[笑哭]"]) + said(["[妙啊]", "[吃瓜]"], 3, video_id="1001")
    assert kept(crawl(tmp_path, comments, videos=2), "--max_emoticons", "1")[1] == {"emoticons": 2}


@pytest.mark.parametrize(("options", "left"), [
    ([], ["up自己说的", "好看极了啊", "very nice indeed", "ABC方案好过DEF方案"]),
    (["--min_likes", "2"], ["好看极了啊", "very nice indeed", "ABC方案好过DEF方案"]),
    (["--drop_uploader", "True"], ["好看极了啊", "very nice indeed", "ABC方案好过DEF方案"]),
    (["--language", "zh"], ["up自己说的", "好看极了啊", "ABC方案好过DEF方案"]),
    (["--total", "2", "--prefer_liked", "True"], ["好看极了啊", "very nice indeed"]),
])  # fmt: skip
def test_rules_that_are_asked_for(tmp_path: Path, options: list[str], left: list[str]) -> None:
    comments = said(["up自己说的", "好看极了啊", "very nice indeed", "ABC方案好过DEF方案"])
    for record, likes, user in zip(comments, (1, 5, 2, None), ("90001", "8", "9", "7"), strict=True):
        record |= {"like_count": likes, "user_id": user}
    assert kept(crawl(tmp_path, comments), *options)[0] == left


def test_authors_of_later_versions_are_hashes(tmp_path: Path) -> None:
    comments = said(["我是作者本人", "我不是作者"])
    for record, name in zip(comments, "ab", strict=True):
        del record["user_id"]
        record["creator_hash"] = name
    folder = crawl(tmp_path, comments, creator_hash="a", user_id="")
    assert kept(folder, "--drop_uploader", "True") == (["我不是作者"], {"uploader": 1})


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def messy(folder: Path, videos: int = 40) -> Path:
    """A crawl with something for every rule under every video."""
    comments, draw = [], random.Random(3)
    for of in range(videos):
        letters = [chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(400)]
        texts = ["".join(letters[start : start + 20]) for start in range(0, 400, 20)]
        texts += ["前排", "沙发！", "加薇 zq77lm90", "1", "[doge]", "字" * 600]
        comments += said(texts, of * 1000 + 1, video_id=str(1000 + of))
        comments += said(["要的", "要", "顶", "1"], of * 1000 + 900, video_id=str(1000 + of),
                         parent_comment_id=str(50000 + of * 1000 + 1))  # fmt: skip
    return crawl(folder, comments, videos)


@pytest.mark.slow
def test_cleaning_moves_nothing_between_the_splits(tmp_path: Path) -> None:
    """Any rules, any seed: what is left is where it is without cleaning."""
    folder = messy(tmp_path)
    for seed in ("0", "1"):
        options = ["--test_size", "0.3", "--seed", seed]
        before, _ = prepare(folder, *options)
        for rules in ([], ["--max_repeats", "1"], ["--contacts", "mask"], ["--drop_bait", "False"]):
            after, report = prepare(folder, *options, "--clean", "True", *rules)
            assert {record["split"] for record in after.values()} == {"train", "test"}
            assert all(record["split"] == before[id]["split"] for id, record in after.items())
            assert report["read"] == len(after) + sum(report["dropped"].values())


def test_report_and_file_of_what_is_dropped(tmp_path: Path) -> None:
    folder = messy(tmp_path)
    _, report = prepare(folder, "--clean", "True", "--write_dropped", "True")
    assert {reason for reason, count in report["dropped"].items() if count} == {
        "contact", "bait", "too_short", "too_long", "repeat",
    }  # fmt: skip
    assert all(len(texts) == 3 for texts in report["examples"].values())
    assert report["examples"].keys() == {reason for reason, count in report["dropped"].items() if count}
    path = tmp_path / "crawl_out/dropped.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = {reason: sum(row["reason"] == reason for row in rows) for reason in report["examples"]}
    assert counts == {reason: count for reason, count in report["dropped"].items() if count}
    assert "zq77lm90" not in path.read_text(encoding="utf-8"), "contact details are masked there, too"
    path.unlink()
    prepare(folder, "--clean", "True")
    assert not path.exists()


def test_same_answer_whatever_the_order_of_the_files(tmp_path: Path) -> None:
    folder = messy(tmp_path)
    first, _ = prepare(folder, "--clean", "True")
    records = json.loads((folder / "x_comments.json").read_text(encoding="utf-8"))
    write_json(folder / "x_comments.json", records[::-1])
    second, _ = prepare(folder, "--clean", "True")
    assert first == second
