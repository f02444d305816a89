"""Contact details and short links in texts that people write, in disguise too: full-width digits, digits with spaces or
Chinese numerals between them, "薇" for WeChat, "裙" for a group.

The patterns are for Python's and DuckDB's engines alike; DuckDB's has no look-around.
"""

import re

SOMEONE = "@某人"  # Stands for people who are mentioned,
MASK = "（联系方式）"  # and for contact details.

_DIGIT = "[0-9０-９〇零一二三四五六七八九壹贰叁肆伍陆柒捌玖幺①-⑨❶-❾⓪⑴-⑼⁰¹²³⁴-⁹₀-₉𝟎-𝟿]"
_GAP = "[ \t\u3000\ufe0f\u20e3_*·•~～—–－-]{0,3}"
_LINK_CHARACTERS = "[号码是为叫加聊搜索同呗个下我：:＝=>→\t \u3000+＋➕,，(（「【」】\ufe0f]"
_LINK = _LINK_CHARACTERS + "{0,6}(?:id[：: ]{1,2})?"
_BEFORE = "(^|[^0-9A-Za-z])"
# Behind these, not only behind "微信号是", a name may be letters alone.
_HIDDEN_WECHAT = (
    "微[ ❤♥\ufe0f]*信|[微薇威維维徽溦魏葳][信芯心❤♥]|薇|绿泡泡|v[ ]?[信芯心❤♥]|v[-.]?x[.]?|[ｖＶ][ｘＸ]"
)
_WECHAT = (
    f"{_HIDDEN_WECHAT}|wx|[ｗＷ][ｘＸ]|[vｖＶ][：:]|[加＋➕][ ]?(?:v|微|威|维|w|卫星)|[+＋][ ]?[vｖＶ][x信]?[：: ]"
    "|wei[ ]?(?:xin|信)|we[ ]?chat|卫星[： :]|🛰\ufe0f?"
)
# Those that begin with a Latin letter or a mark, and those that are found behind letters and digits too ("1群").
_QQ = "(?:q[ .]?q|ｑｑ)[群裙羣峮号]{0,2}|qun|q[号群裙羣峮：:]|[➕＋+][ ]?q"
_GROUP = "扣扣|企鹅|🐧|[扣裙群羣峮]号?(?:[0-9一二三四五①-⑤][群]?[：: ]{1,2})?|君羊|[抠叩蔻球秋丘]{2}|[加联系找私][ ]?q"
_PHONE = "电话|手机号?|联系方式|联系|致电|热线|tel"
_PLATFORM = "(?:小红书|抖音|快手)(?:号|id|搜索?)"
_USER = "(?:u|b站|玩家|bili[ ]?)?id|uid|(?:小红书|抖音|快手)号?"
_TOP_LEVEL = "(?:com|cn|net|org|edu|me|io|cc|co|top|xyz|vip)"
# Of short links, invitations, cloud disks and forms.
_SITES = "|".join((
    r"b23[.。．点]tv", r"bili(?:22|23|33|2233)[.。．点]cn", r"t\.cn", r"dwz\.cn", r"url\.cn", r"suo\.im", r"is\.gd",
    r"bit\.ly", r"tinyurl\.com", r"t\.me", r"wa\.me", r"discord\.gg", r"t\.zsxq\.com", r"[cem]\.tb\.cn",
    r"s\.click\.taobao\.com", r"u\.jd\.com", r"3\.cn", r"docs\.qq\.com", r"(?:www\.)?kdocs\.cn",
    r"share\.weiyun\.com", r"(?:www\.)?wjx\.(?:cn|top)", r"pan\.(?:quark\.cn|baidu\.com|xunlei\.com)",
    r"drive\.uc\.cn", r"(?:www\.)?(?:aliyundrive|alipan)\.com", r"cloud\.189\.cn", r"(?:www\.)?123pan\.com",
    r"(?:[a-z0-9-]+\.)?lanzou[a-z]?\.com", r"v\.douyin\.com", r"xhslink\.com", r"(?:jq|qm|q|wpa)\.qq\.com",
    r"u\.wechat\.com", r"work\.weixin\.qq\.com",
))  # fmt: skip


def _digits(least: int) -> str:
    return f"{_DIGIT}(?:{_GAP}{_DIGIT}){{{least - 1},}}"


# Names, addresses and short links. Group 1 is what stands before, and stays.
NAMES = (
    f"(?i){_BEFORE}(?:"
    f"(?:{_WECHAT}){_LINK}(?:[a-z_-]{{1,15}}[0-9_][a-z0-9_-]{{2,}}|[0-9]{{1,5}}[a-z][a-z0-9_-]{{3,}}"
    "|(?:[a-z0-9][ ]){4,}[a-z0-9])"
    "|v[ ]{1,2}[a-z]{2,10}[0-9]{3,8}"
    f"|(?:{_WECHAT}){_LINK_CHARACTERS}{{0,3}}(?:id)?[号是搜：:][是：: ]{{0,2}}[a-z][a-z0-9_-]{{5,19}}"
    f"|(?:{_HIDDEN_WECHAT})[ =＝→👉]{{1,3}}[a-z][a-z0-9_-]{{5,19}}"
    "|公[众粽重]号[ ]?[：:「【“‘]{1,2}[^\\s，。,！!?？；;、」】”’)）]{2,16}[」】”’]?"
    f"|[加＋➕+][我个 ]{{0,2}}(?:v|vx|wx|微信?|薇信?|威信?){_LINK_CHARACTERS}{{1,6}}[a-z][a-z0-9_-]{{5,19}}"
    f"|{_PLATFORM}[：: ]{{0,2}}[a-z][a-z0-9_.-]{{4,19}}"
    r"|[0-9A-Za-z._+-]+[ ]?(?:[@＠#][ ]?qq[.。．点]com|qq邮箱)|[￥¥][0-9A-Za-z]{8,13}[￥¥]"
    r"|[0-9A-Za-z._+-]+(?:[@＠]|[ ]?(?:艾特|\(at\))[ ]?)[0-9A-Za-z-]+(?:[.。．点][0-9A-Za-z-]+)*[.。．点]"
    rf"{_TOP_LEVEL}"
    "|[微薇][号：: ]{0,2}(?:[a-z_-]{1,15}[0-9_][a-z0-9_-]{2,}|[0-9]{1,5}[a-z][a-z0-9_-]{3,})"
    rf"|(?:https?://)?(?:space\.bilibili\.com|(?:m\.|www\.)?bilibili\.com/space|(?:{_SITES})/)"
    r"[0-9A-Za-z_./?=&%+#-]*)"
)
_SPACE = "[ \ufe0f\u20e3-]{0,3}"  # In a telephone's number.
_INVITES = "(?:这是|是)?(?:加[我群qv微薇入个，,。!！ ]|满[了员人]|备注|[^0-9 ]{0,3}[群裙]|[进来聊群裙私扣])"
# Numbers: after a word, nine to eleven digits before an invitation, or a telephone's. Groups 1, 2, 3 and 6 are what
# stands before, of one of these forms, and 4, 5 and 7 what follows.
NUMBERS = (
    f"(?i)(?:{_BEFORE}(?:(?:{_WECHAT}|{_QQ}){_LINK}{_digits(6)}|q[ ]?q{_LINK}{_digits(5)}"
    f"|(?:{_PHONE}){_LINK}{_digits(10)}|(?:{_USER})[：: 是]{{0,3}}{_digits(6)})"
    f"|(^|(?s:.))(?:{_GROUP}){_LINK}{_digits(6)}"
    f"|(^|[^0-9A-Za-z/=_.-])(?:[1-9１-９][0-9０-９]{{8,10}}[ ，,。!！~（(]{{0,2}}({_INVITES})))"
    "($|[^0-9０-９.%％元块刀分万亿年月日次人度积保多只种名位米播]|[.](?:$|[^0-9]))"
    f"|(^|[^0-9A-Za-z/=_.-])(?:(?:[+＋]?86[ -]?)?[1１一幺壹①]{_SPACE}[3-9３-９三四五六七八九叁肆伍陆柒捌玖③-⑨]"
    f"(?:{_SPACE}{_DIGIT}){{9}}"
    "|(?:q[ ]?|找我|要的加|联系我)[1-9][0-9]{7,9}"
    "|1[3-9][0-9][./，,丶、·_ ]{1,2}[0-9]{4}[./，,丶、·_ ]{1,2}[0-9]{4}"
    "|0[0-9]{2,3}-[0-9]{7,8}|[48]00-?[0-9]{3}-?[0-9]{4}"
    "|[1-9][0-9]{6,10}[ ]?[（(【「](?:[裙群扣薇qv]|群号|扣扣|企鹅|🐧|君羊|qq|[微薇]信)[）)】」])($|[^0-9０-９])"
)
MASKED_NAME, MASKED_NUMBER = rf"\1{MASK}", rf"\1\2\3\6{MASK}\4\5\7"
CONTACT = re.compile(f"{NAMES}|{NUMBERS.removeprefix('(?i)')}")
