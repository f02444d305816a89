"""Contact details and short links in texts that people write, in disguise too: full-width digits, digits with spaces or
Chinese numerals between them, "薇" for WeChat, "裙" for a group.

The patterns are for Python's and DuckDB's engines alike; DuckDB's has no look-around.
"""

import re

MASK = "（联系方式）"

_DIGIT = "[0-9０-９〇零一二三四五六七八九壹贰叁肆伍陆柒捌玖幺]"
_GAP = "[ \t\u3000_*·•~～,，、。—–－-]{0,3}"
_LINK = "[号码是为叫加聊：:＝=>→\t \u3000+＋➕,，(（「【]{0,6}"
_BEFORE = "(^|[^0-9A-Za-z])"
_WECHAT = (
    "微信|薇信|威信|维信|微❤|薇❤|v[ ]?信|v❤|vx|wx|v[：:]|[加+＋➕][ ]?(?:v|微|威|维|w|卫星)|[薇徽]|wei[ ]?xin"
    "|we[ ]?chat"
)
_QQ = "扣扣|企鹅|🐧|q[ ]?q|ｑｑ|qun|[扣裙群羣峮]|君羊"
_PHONE = "电话|手机号?|联系方式|联系|致电|热线|tel"
_USER = "(?:u|b站|玩家)?id|uid"


def _digits(least: int) -> str:
    return f"{_DIGIT}(?:{_GAP}{_DIGIT}){{{least - 1},}}"


# Names, addresses and short links. Group 1 is what stands before, and stays.
NAMES = (
    f"(?i){_BEFORE}(?:"
    f"(?:{_WECHAT}){_LINK}(?:[a-z_-]{{1,15}}[0-9_][a-z0-9_-]{{2,}}|[0-9]{{1,5}}[a-z][a-z0-9_-]{{3,}})"
    f"|(?:{_WECHAT})[号是]?[：:][ ]?[a-z][a-z0-9_-]{{5,19}}"
    f"|[加+＋➕][ ]?(?:v|vx|wx|微信?|薇信?|威信?){_LINK}[a-z][a-z0-9_-]{{5,19}}"
    r"|[0-9A-Za-z._+-]+[ ]?[@＠][ ]?[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*\.[A-Za-z]{2,}"
    r"|(?:https?://)?(?:space\.bilibili\.com|(?:b23\.tv|bili2233\.cn|t\.cn|dwz\.cn|url\.cn|suo\.im|is\.gd|bit\.ly|t\.me|"
    r"wa\.me|discord\.gg|[em]\.tb\.cn|u\.jd\.com|3\.cn|v\.douyin\.com|xhslink\.com|[jq]m?\.qq\.com|wpa\.qq\.com|"
    r"u\.wechat\.com|work\.weixin\.qq\.com)/)[0-9A-Za-z_./?=&%+#-]*"
    ")"
)
# Numbers: after a word, a mobile phone's, or nine to eleven digits that are no amount and in no address. Groups 1 and 2
# are what stands before, 3 is what follows.
NUMBERS = (
    f"(?i)(?:{_BEFORE}(?:(?:{_WECHAT}|{_QQ}){_LINK}{_digits(5)}|(?:{_PHONE}){_LINK}{_digits(7)}"
    f"|(?:{_USER})[：: ]{{1,3}}{_digits(6)})"
    "|(^|[^0-9A-Za-z/=_.-])(?:[1１][ -]?[3-9３-９](?:[ -]?[0-9０-９]){9}"
    "|[1-9１-９](?:[0-9０-９]{8,10}|[0-9]{2,3}(?:[ -][0-9]{3,4}){2})))"
    r"($|[^0-9０-９.%％元块刀分万亿年月日次人度]|[.](?:$|[^0-9]))"
)
CONTACT = re.compile(f"{NAMES}|{NUMBERS.removeprefix('(?i)')}")
