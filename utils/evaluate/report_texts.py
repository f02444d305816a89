"""The texts of the report, in Chinese and English."""

KINDS = {
    "zh": {
        "base": "原模型，提示词与训练时相同",
        "style prompt": "原模型，加一段写作风格的提示词",
        "few-shot": "原模型，提示词里放几条真实评论",
        "tuned": "微调后的模型",
        "api": "API 背后的模型",
    },
    "en": {
        "base": "the model before tuning, prompted as in training",
        "style prompt": "the model before tuning, told in its prompt how to write",
        "few-shot": "the model before tuning, with a few real comments in its prompt",
        "tuned": "a tuned model",
        "api": "a model behind an API",
    },
}
TITLES = {
    "zh": {
        "likelihood": "真人的回复，它觉得有多自然？",
        "reading": "它读懂视频和评论了吗？（50% 是瞎猜）",
        "fitting": "它写的回复对题吗？（50% 是放哪儿都行）",
        "noticed": "看得出是模型写的吗？（50% 看不出，100% 一眼看穿）",
        "judged": "评审觉得谁写得好？",
    },
    "en": {
        "likelihood": "How natural does it find what people wrote?",
        "reading": "Does it read the video and the comment? (50%: it guesses)",
        "fitting": "Do its replies fit what they answer? (50%: they fit anywhere)",
        "noticed": "Would one notice that a model wrote them? (50%: nobody can, 100%: at once)",
        "judged": "Whose replies does the judge prefer?",
    },
}
MEANINGS = {
    "zh": {
        "likelihood": "猜中真实回复的一个字平均要多少比特。"
        "（只看回复的文字，不看结束符，所以分词器不同也能比。）",
        "reading": "把一条真实回复放到它自己的视频和评论之后，再放到别处（同一视频、别的视频各最多 {others} 条）之后，"
        "模型有多少次认为在原处更可能。50% 等于瞎猜。量了 {read:,} 条回复。",
        "fitting": "同样的做法，换成它自己写的回复，由原模型来读。50% 说明回复放到哪里都一样。"
        "一半以上照抄原话、或带着提示词格式的回复算 50%。量了 {read:,} 条回复。",
        "noticed": "给分类器一条真实回复和一条模型回复（来自它没见过的视频），它能挑对的机会（AUC）。"
        "50% 是分不出来。真实回复之间互比：{floor}。至少要 {pairs_needed} 条评论才下结论，这里有 {comments:,} 条。",
        "judged": "评审看两条回复（两种先后各看一次），更喜欢它的比例；两次说法不一算一半。"
        "50% 是不分上下。共比了 {pairs:,} 对，其中 {disagree} 两次说法不一。",
    },
    "en": {
        "likelihood": "Bits that it takes to guess a character of the real replies. (Of the text "
        "alone, without its end, so that models with different tokenizers compare.)",
        "reading": "A real reply is read after its own video and comment and after others (up to {others} of the same "
        "video, {others} of other videos): how often it is likelier after its own. 50% is guessing. Of {read:,} "
        "replies.",
        "fitting": "The same of the replies that it wrote, read by the model before tuning. 50% means that they would "
        "fit anywhere. A reply of which half or more repeats what it answers, or that holds parts of the prompt's "
        "format, counts as 50%. Of {read:,} replies.",
        "noticed": "A classifier gets a real and a written reply, of videos that it has not seen: how often it picks "
        "the right one (AUC). 50% is guessing. Real replies against one another: {floor}. A verdict takes "
        "{pairs_needed} comments or more; here are {comments:,}.",
        "judged": "The judge sees two replies, in both orders: how often it prefers this one; contradictions count "
        "half. 50% is a draw. It compared {pairs:,} pairs, and contradicted itself in {disagree}.",
    },
}
VERDICTS = {
    "zh": {"better": "更好", "worse": "更差", "equal": "分不出高下", "few": "数据太少，不下结论"},
    "en": {"better": "better", "worse": "worse", "equal": "not to be told apart", "few": "too little data to say"},
}
WORDS = {
    "zh": {
        "title": "评测：{name}", "comments": "{comments:,} 条留出的评论，来自 {videos:,} 个视频",
        "left_out": "（另有 {left_out:,} 条没有算：对某个模型来说太长，或者它还没有回复）", "which": "该用哪个？",
        "take": "用 {best}。", "several": "{best} 之间分不出高下，任选其一。",
        "depends": "要看看重什么：{best} 各有更好的地方，见下面各个问题。",
        "counts": "{one} 比 {other}：{better} 个问题上更好，{worse} 个更差，{rest} 个分不出或数据太少",
        "none": "数据太少，还说不出该用哪个。至少要 {videos} 个视频（“看得出”一问至少要 {pairs} 条评论）。",
        "who": "谁在回答",
        "numbers": "数字与 95% 区间", "details": "细看", "same": "同一视频内", "far": "换到别的视频",
        "length": "只看长度", "shares": "回复里有什么（占全部回复的比例）",
        "normal": "“真人”一列是正常水平：很短的回复本来就常常雷同。", "less": "越低越好 ↓", "more": "越高越好 ↑",
        "style": "写法与真人差多远",
        "distance": "距离：长度按字数，其余 0 为相同、1 为毫无共同之处；“真人”一列是真实回复随机分两半的距离，"
        "也就是光凭运气会差多少。",
        "lengths": "回复的长度", "lengths_axis": "不超过这么多字的回复占多少", "commonest": "最常见的回复",
        "marks": "每 100 条回复出现几次", "examples": "并排看几条", "real": "真人", "comment": "视频与评论",
        "settings": "怎么看区间：重新抽取视频 2000 次，结果有 95% 落在区间里；两个模型的差用同样的抽样算出，"
        "差的区间不含 0 才说更好或更差。因为比的是同样的视频，两个区间有重叠也可能分得出高下；"
        "差距很小时，用起来未必有感觉。各次比较分开计算，没有按比较次数放宽。",
        "scores": {
            "likelihood": "每字比特", "reading": "读懂", "fitting": "对题", "noticed": "被识破", "judged": "评审",
        },
        "share_names": {
            "echo": "重复原话", "copied, whole": "整条抄自训练数据", "copied, part": "连续 15 字抄自训练数据",
            "equal": "与另一条评论下的回复相同", "contact": "联系方式", "link": "链接", "control": "控制符或提示词残留",
            "empty": "空回复", "cut": "写到最长也没写完", "emoticons": "带 [表情]", "emoji": "带 emoji",
        },
        "distance_names": {
            "length": "长度", "emoticons": "[表情]", "emoji": "emoji", "punctuation": "标点", "beginnings": "开头两字",
        },
        "distinct": "distinct-2（越高越多样）", "median": "字数，中位数", "mean": "字数，平均",
    },
    "en": {
        "title": "Evaluation: {name}", "comments": "{comments:,} held-out comments under {videos:,} videos",
        "left_out": " ({left_out:,} more are left out: too long for one of the models, or not answered by all)",
        "which": "Which one to take?", "take": "Take {best}.",
        "several": "{best} cannot be told apart: take any.",
        "depends": "It depends on what counts: {best} are each better at something, see the questions below.",
        "counts": "{one} against {other}: better in {better} questions, worse in {worse}, undecided in {rest}",
        "none": "There is too little data to say. It takes at least {videos} videos (and {pairs} comments for whether "
        "one would notice).",
        "who": "Who answers", "numbers": "Numbers and 95% intervals", "details": "In detail",
        "same": "within the same video", "far": "against other videos", "length": "by length alone",
        "shares": "What is in the replies (share of all replies)",
        "normal": "The column of the real replies shows what is normal: short replies come again and again.",
        "less": "less is better ↓", "more": "more is better ↑",
        "style": "How far from how people write",
        "distance": "Distances: of the length in characters, else from 0 (the same) to 1 (nothing in common). The "
        "column of the real replies is that of one random half from the other: what chance does.",
        "lengths": "Length of the replies", "lengths_axis": "share of the replies that are not longer",
        "commonest": "The commonest replies", "marks": "How often in 100 replies", "examples": "Some side by side",
        "real": "real", "comment": "video and comment",
        "settings": "Intervals: videos are drawn anew 2,000 times, and 95% of the results lie within. The difference "
        "of two models is taken in the same draws; only where its interval does not hold 0 is one called better or "
        "worse. Since the same videos are compared, two intervals may overlap and the models still be told apart; of a "
        "small difference nobody need notice anything. "
        "Comparisons are made one by one, not corrected for how many there are.",
        "scores": {"likelihood": "bits per character", "reading": "reads", "fitting": "fits", "noticed": "noticed",
                   "judged": "judged"},
        "share_names": {
            "echo": "repeats what it answers", "copied, whole": "stands in the training data as a whole",
            "copied, part": "has 15 characters of the training data", "equal": "equals a reply to another comment",
            "contact": "contact details", "link": "links", "control": "control tokens or parts of the prompt",
            "empty": "empty", "cut": "not finished at the longest length", "emoticons": "with [emoticons]",
            "emoji": "with emoji",
        },
        "distance_names": {
            "length": "length", "emoticons": "[emoticons]", "emoji": "emoji", "punctuation": "punctuation",
            "beginnings": "first two characters",
        },
        "distinct": "distinct-2 (more is more varied)", "median": "characters, median", "mean": "characters, mean",
    },
}  # fmt: skip
