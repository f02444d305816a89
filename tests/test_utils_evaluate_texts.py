"""utils/evaluate/texts.py: what is counted in replies, by hand.

python -m pytest tests/test_utils_evaluate_texts.py
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from utils.data.records import comment_prompt
from utils.evaluate.texts import (
    COPY_CHARACTERS,
    copied,
    distance,
    distinct_2,
    halves,
    is_echo,
    length_distance,
    marks,
    normalised,
    repeated_texts,
    unwanted,
)

QUESTION = comment_prompt("三月的旧书摊一日游", "逛了一整天", "老板说这本书要五十块")
ANSWER = "昨天我也在那条街上买到了一本很旧的地图册"  # 20 characters.


def test_normalised() -> None:
    """One form of each letter: without spaces, full width like half width, small letters."""
    assert normalised(" ＡBc １２\n３ ！　好") == "abc123!好"


def test_distinct_2_by_hand() -> None:
    """哈哈 twice, then 哈哈 and 哈好: two of four."""
    assert distinct_2(["哈哈哈", "哈哈好"]) == 2 / 4
    assert distinct_2(["好", ""]) == distinct_2([]) == 0
    assert distinct_2(["甲乙", "丙丁"]) == 1
    assert distinct_2(["甲乙丙", "乙丙"]) == 2 / 3


def test_repeated_texts() -> None:
    assert repeated_texts(["好看!", "甲", "好 看！", "OK", "ｏｋ", "好看"]) == [True, False, True, True, True, False]
    assert repeated_texts(["", " "]) == [True, True]
    assert repeated_texts([]) == []


@pytest.mark.parametrize(
    "reply, wanted",
    [
        ("老板说这本书要五十块", True),  # The comment.
        ("三月的旧书摊一日游", True),  # The title.
        ("三月的 旧书摊！", True),
        ("旧书摊一旧书摊一旧书摊一", True),  # Three times a part.
        ("这本书要也太贵了", True),  # Just half.
        ("这本书要也太贵了吧", False),
        ("老板人真好，下次我也想去看看", False),  # One word of the comment.
        ("旧书摊", False),  # Too short to tell from a word.
        ("太贵了", False),
        ("", False),
    ],
)
def test_echoes(reply: str, wanted: bool) -> None:
    assert is_echo(reply, QUESTION) is wanted


def test_copies() -> None:
    """15 characters of 20, wherever they stand, are a part; 14 are not; a short text is copied only as a whole."""
    middle, start, end = ANSWER[3:18], ANSWER[:15], ANSWER[5:]
    assert {len(middle), len(start), len(end)} == {COPY_CHARACTERS} == {15}
    replies = {
        ANSWER: "whole",
        f" {ANSWER[:9]}  {ANSWER[9:]}": "whole",
        ANSWER + "！": "part",
        f"对啊{middle}吧": "part",
        f"对啊{start}": "part",
        f"{end}哈": "part",
        f"对啊{ANSWER[3:17]}吧": "",
        f"{ANSWER[:14]}嗯{ANSWER[6:]}": "",
        "前排": "whole",
        "前排！": "",
        "": "",
        "这一句话谁也没有在训练数据里写过，真的": "",
    }
    assert copied([*replies], ["前排", ANSWER, ""]) == [*replies.values()]
    assert copied([*replies], []) == [""] * len(replies)
    assert copied([ANSWER + "！"], [f"开头{ANSWER}结尾"]) == ["part"]


def test_training_answers_are_gone_through_once() -> None:
    asked = 0

    def training() -> Iterator[str]:
        nonlocal asked
        for answer in ("前排", "后排", ANSWER):
            asked += 1
            yield answer

    assert copied(["后排", ANSWER, "前排", "左排", ANSWER[:15]], training()) == ["whole", "whole", "whole", "", "part"]
    assert asked == 3


@pytest.mark.parametrize(
    "text",
    [
        "需要的联系我13800000000",
        "电话：13912345678，白天打",
        "加我QQ：1234567890",
        "qq群 987654321 来一起玩",
        "资源加微信号：abc_12345",
        "+v信abcde12345",
        "VX:ab-cd-ef-00",
        "wx abc000000",
        "扣扣12345678",
        "企鹅群：111222333",
        "投稿发到 someone.else@example.com 就行",
        "138-0000-0000 随时",
        "打138 0000 0000",
        "加V：abc12345",
        "电话１３８００００００００",
        "群号123456789",
        "我的邮箱nobody@mail.example.org",
        "UID:12345678901234",
    ],
)
def test_contact_details(text: str) -> None:
    assert "contact" in unwanted(text)


@pytest.mark.parametrize(
    "text",
    [
        "2024年最好看的视频",
        "1080p60帧，画质真好",
        "买票上12306啊",
        "圆周率3.14159265",
        "可以看BV1xx411c7mD这个",
        "BV1wx411c7mD讲得更细",
        "搜bv1Qq411c7mD和BV1vX411c7mD",
        "av170001在此",
        "时间戳1700000000000",
        "23333333333333",
        "QQ音乐有这首歌",
        "微信支付不行吗",
        "企鹅好可爱",
        "@小明 快来看",
        "第13集1分38秒",
        "666666",
    ],
)
def test_harmless_numbers(text: str) -> None:
    assert not unwanted(text)


@pytest.mark.parametrize(
    "text, link",
    [
        ("看这里https://example.com/a", True),
        ("http://1.2.3.4", True),
        ("www.example.info", True),
        ("b23.tv/abc123", True),
        ("去example.com看看", True),
        ("my-site.TOP有", True),
        ("example.community 里", False),
        ("3.14和2.0", False),
        ("第1.5集", False),
        ("com.cn什么意思", True),
        ("啊...cn", False),
    ],
)
def test_links(text: str, link: bool) -> None:
    assert ("link" in unwanted(text)) is link


@pytest.mark.parametrize(
    "text",
    [
        "好看<|im_end|>",
        "<|im_start|>user",
        "<|endoftext|>",
        "好<end_of_turn>",
        "<start_of_turn>model",
        "<bos>好",
        "好<eos>",
        "好</s>",
        "<s>好",
        "[INST] 好 [/INST]",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>",
        "<think>嗯</think>好",
        "### User: 你好",
        "### Assistant: 你好",
        *QUESTION.splitlines(),
    ],
)
def test_control_tokens(text: str) -> None:
    assert "control" in unwanted(text)


@pytest.mark.parametrize("text", ["<好看>", "<|", "a|b", "[doge]", "1<2>0", "视频标题党", "父评论说得对", "### 好"])
def test_no_control_tokens(text: str) -> None:
    assert "control" not in unwanted(text)


def test_marks_by_hand() -> None:
    found = marks(["好看[doge][笑哭]😂！", "好 看，真的……[doge]", "😂😂？", ""])
    assert found["emoticons"] == {"[doge]": 2, "[笑哭]": 1}
    assert found["emoji"] == {"😂": 3}
    assert found["punctuation"] == {"！": 1, "，": 1, "…": 2, "？": 1}
    assert found["beginnings"] == {"好看": 2, "😂😂": 1, "": 1}


def test_distance() -> None:
    """0 for equal ones, 1 if they have nothing in common; else as its definition says, in plain numpy."""
    one, two = Counter({"甲": 3, "乙": 1}), Counter({"甲": 1, "乙": 2, "丙": 5})
    assert distance(one, one) == distance(Counter(), Counter()) == 0
    assert distance(one, Counter({"甲": 21, "乙": 7})) == pytest.approx(0)
    assert distance(one, Counter({"丁": 9})) == pytest.approx(1)
    assert np.isnan(distance(one, Counter())) and np.isnan(distance(Counter(), one))
    p, q = np.array([3, 1, 0]) / 4, np.array([1, 2, 5]) / 8
    middle, divergence = (p + q) / 2, 0.0
    for side in (p, q):
        some = side > 0
        divergence += (side[some] * np.log2(side[some] / middle[some])).sum() / 2
    assert distance(one, two) == distance(two, one) == pytest.approx(np.sqrt(divergence))


def test_length_distance_by_hand() -> None:
    assert length_distance(["甲", "甲乙丙"], ["甲乙丙", "甲"]) == 0
    assert length_distance(["甲", "甲乙丙"], ["甲乙", "甲乙丙丁"]) == pytest.approx(1)
    assert length_distance(["甲"], ["", "甲", "甲乙丙丁"]) == pytest.approx((1 + 0 + 3) / 3)


def test_halves() -> None:
    """Each text comes into one of them, at random, and always into the same one."""
    texts = [str(number) for number in range(101)]
    one, two = halves(texts)
    assert (len(one), len(two)) == (51, 50)
    assert sorted(one + two) == sorted(texts)
    assert halves(texts) == (one, two) != halves(texts, seed=1)
    assert 10 < sum(int(text) < 50 for text in one) < 40
    assert halves([]) == ([], [])
