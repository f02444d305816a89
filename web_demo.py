"""A page in the browser: the prepared data, replies to comments, a conversation, training runs, and a guessing game.

    streamlit run web_demo.py -- --model output_hf/BiliComments
    streamlit run web_demo.py -- --model output_hf/BiliComments --base model/Qwen/Qwen2.5-3B      # side by side
    streamlit run web_demo.py -- --model model/Qwen/Qwen2.5-3B --adapter deepspeed_ft/output/DS-Qwen/Qwen2.5-3B/1
    streamlit run web_demo.py --server.address 127.0.0.1 --server.port 6006 -- --api http://127.0.0.1:8000
    streamlit run web_demo.py -- --api https://api.example.com/v1 --api_key_env MY_KEY

Streamlit's own arguments stand before `--`. The page is a client of an OpenAI-compatible API; with --model it starts
this project's server (serve.py) in the same process, on a free port of this machine. Everything that people or models
wrote is shown as the text it is, never as HTML or Markdown.
"""

import argparse
import asyncio
import json
import os
import re
import secrets
import shlex
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile, zip_longest
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from utils.api import is_local, make_client
from utils.data import prepared
from utils.data.crawl_files import LABELS
from utils.data.held_out import parts_of
from utils.data.records import SYSTEM_PROMPT, DataError, comment_prompt
from utils.files import from_root, read_lines, shown
from utils.train.tracking import curve, smoothed

TUNED = "tuned"  # What the adapter is called.
DRAW_SEC = 0.1  # Between two looks at what has come of a reply.
FOLLOW_SEC = 3  # Between two looks at a run's files.
MOST_POINTS = 1500  # Of a curve.
MOST_REPLIES = 8
FEW_GUESSES = 30  # Fewer say nothing about a model.
FEW_SAMPLES = 3
# Of the guessing game: what matters stands out, and a long description does not push the replies off the screen.
STYLE = """<style>
.st-key-video_title [data-testid=stText] { font-size: 1.15rem; font-weight: 600; }
.st-key-video_desc [data-testid=stText] { max-height: 9rem; overflow-y: auto; opacity: 0.7; font-size: 0.9rem; }
.st-key-reply_0 [data-testid=stText], .st-key-reply_1 [data-testid=stText] { font-size: 1.1rem; }
[class*=st-key-writer_] [data-testid=stText] { font-size: 0.9rem; opacity: 0.7; }
</style>"""
TOO_LONG = re.compile(r"token|length|long|长", re.IGNORECASE)  # How servers refuse what does not fit.
NEWEST = -1  # Whichever step it is.
START = "streamlit run web_demo.py --"

EXAMPLE = {
    "title": "【木工】用一块旧门板做书桌，零基础七天完工",
    "desc": "门板是楼下捡的，工具加木蜡油一共花了两百三。图纸在最后，想抄作业的自取。",
    "parent": "桌腿只用木榫不打螺丝，压两台显示器真的不会晃吗？",
}

TEXTS = {
    "zh": {
        "comments": "评论区",
        "chat": "对话",
        "training": "训练",
        "sampling": "采样设置",
        "temperature": "温度",
        "temperature_help": "越高越随意；0 表示每次都取最可能的词。",
        "top_p": "top_p",
        "top_p_help": "只在概率之和达到这个值的最可能的词里选。",
        "top_k": "top_k",
        "top_k_help": "只在最可能的 k 个词里选；0 表示由服务器决定。",
        "penalty": "重复惩罚",
        "penalty_help": "大于 1 时不爱重复；1 表示由服务器决定。",
        "max_tokens": "回复最长（token）",
        "seed": "随机种子",
        "seed_help": "种子相同，回复就相同；留空则每次不同。",
        "tuned_model": "微调后的模型",
        "base_model": "原模型",
        "no_base": "（不对比）",
        "reload": "重新连接",
        "comments_lead": "填入视频的标题、简介和一条评论，看看模型会怎么回复，微调前后并排对比。",
        "title": "视频标题",
        "desc": "视频简介（可以不填）",
        "parent": "要回复的评论（不填则直接评论视频）",
        "system": "系统提示词",
        "count": "回复条数",
        "example": "填入示例",
        "write": "生成回复",
        "no_title": "请先填写视频标题。",
        "greedy_one": "温度为 0 时每次回复都一样，因此只生成一条。",
        "tuned": "微调后",
        "base": "微调前",
        "prompt_shown": "模型看到的内容",
        "stop": "停止",
        "cut": "（到了最长限制）",
        "empty": "（空回复）",
        "stopped": "（已停止）",
        "left_out": "（对话太长：最早的 {count} 轮模型已经看不到）",
        "chat_lead": "和模型多聊几轮。每一轮它都能看到前面的对话。",
        "speaker": "和谁聊",
        "say": "说点什么…",
        "clear": "清空对话",
        "loading": "正在加载模型，请稍候…",
        "training_lead": "曲线和样例会随着训练自动更新，每 {seconds} 秒看一次文件。",
        "run": "训练目录",
        "run_help": "可以选择，也可以直接输入路径后回车。",
        "no_runs": "还没有训练记录。用下面的命令开始一次训练，这里会自动出现：",
        "no_metrics": "这个目录里没有 metrics.jsonl：",
        "no_lines": "训练刚开始，还没有写下任何一步。",
        "bad_lines": "这个目录里的文件不是本项目写的，无法读取：",
        "at_step": "已到第 {step} 步",
        "loss": "损失",
        "lr": "学习率",
        "grad_norm": "梯度范数",
        "speed": "每秒 token 数",
        "train": "训练，每一步",
        "smooth": "训练，平滑",
        "eval": "留出集",
        "step": "步",
        "samples": "留出样例的回复",
        "no_samples": "还没有样例。每次在留出集上测损失时，模型会回复几条样例。",
        "sample_step": "第几步",
        "newest": "最新（第 {step} 步）",
        "prompt": "提示",
        "reply": "模型的回复",
        "real": "真实的回复",
        "no_arguments": "启动时还没有指定模型。请用下面的一种方式重新启动：",
        "wrong_arguments": "启动参数有误，请在终端里改正后重新启动。",
        "no_server": "模型没有加载成功。",
        "error_key": "服务器不接受密钥（HTTP {status}）。请检查 --api_key_env 指定的环境变量，然后重新启动。",
        "error_missing": "服务器上没有这个模型或地址（HTTP 404）。请检查 --api 和选中的模型。",
        "error_busy": "服务器太忙，或额度已用完（HTTP 429）。请过一会儿再试。",
        "error_loading": "服务器还没有准备好，模型可能仍在加载（HTTP 503）。请过一会儿再试。",
        "error_request": "服务器不接受这个请求（HTTP {status}）。它说：",
        "error_server": "服务器出错了（HTTP {status}）。它说：",
        "error_connection": "连不上服务器 {url}。它可能没有启动，或模型仍在加载。",
        "error_timeout": "服务器太久没有回答。",
        "error_broken": "服务器的回答中断了，或者看不懂。它说：",
        "error_no_models": "服务器没有列出任何模型。",
        "guess": "真假难辨",
        "guess_lead": "一条是真人的回复，一条是模型写的。**哪一条是真人写的？**",
        "no_evaluations": "还没有可以猜的回复。下面的命令让模型回复留出的评论，之后这里会自动出现：",
        "evaluation": "评测",
        "contenders": "和哪些模型比",
        "contenders_help": "不选就是全部。多个模型时是盲猜：猜完才知道是谁写的。选好后点一下页面，按键才有用。",
        "all_contenders": "全部（盲猜）",
        "no_rounds": "这次评测里没有可以猜的回复。",
        "video": "视频",
        "answered": "要回复的评论",
        "pick_0": "① 是真人写的",
        "pick_1": "② 是真人写的",
        "is_real": "真人写的",
        "is_written": "模型写的",
        "guessed_right": "猜对了！",
        "guessed_wrong": "没猜对，你被模型骗过去了。",
        "next": "下一题",
        "points": "猜对",
        "streak": "连对",
        "seen_before": "这条评论你已经见过，可能还记得真人的回复，所以这一次不计入下面的统计。",
        "unwritten": "这一次没能写进 guesses.jsonl，所以不计入大家的统计。",
        "everybody": "大家的成绩",
        "me": "我的成绩",
        "scores_help": "50% 就是完全分不出来，越低越像真人。同一个人对同一条评论只算第一次。",
        "no_guesses": "还没有成绩。",
        "few_guesses": "次数不到 {count} 的，还说明不了什么。",
        "contender": "模型",
        "share": "猜对的比例",
        "interval": "95% 区间",
        "guesses": "次数",
        "data": "数据",
        "data_lead": "prepare_data.py 读到了什么、丢掉了什么、留给模型的是什么。",
        "data_folder": "数据目录",
        "no_data": "还没有准备好的数据。下面的命令用自带的示例准备一份，运行后刷新这一页：",
        "no_report": "这个目录里没有 prepare_data.py 写下的 report.json：",
        "bad_data": "这里的文件读不了。可以重新准备数据：",
        "view": "看什么",
        "overview": "概览",
        "by_chance": "随机样本",
        "search": "搜索",
        "check": "清洗得对吗？",
        "was_read": "读到的评论",
        "for_training": "留作训练",
        "for_test": "留作测试",
        "was_dropped": "丢掉的",
        "of_videos": "{count} 个视频",
        "what": "去向",
        "number": "条数",
        "part": "占读到的",
        "drop_examples": "每种原因的例子",
        "comment_length": "评论长度（字）",
        "prompt_length": "提示长度（字）",
        "lengths": "一半不超过 {half} 字，九成不超过 {most} 字，最长 {longest} 字。最后一根柱子含更长的。",
        "others": "换一批",
        "desc_of": "视频简介",
        "in_answers": "留下的评论",
        "in_prompts": "留下的提示",
        "in_dropped": "丢掉的评论",
        "search_where": "在哪里找",
        "search_text": "要找的文字（回车开始，英文字母不分大小写）",
        "searching": "正在从头到尾读一遍文件，一百万条要几秒到十几秒…",
        "hits": "共 {total} 条，下面是前 {shown} 条。",
        "no_hits": "没有找到。",
        "no_dropped": "丢掉的评论没有存下来。下面的命令会把它们写进 dropped.jsonl：",
        "nothing_cleaned": (
            "清洗没有丢掉任何评论，没有可以检查的：数据又少又干净时会这样。想试试这一页，可以先收紧一条规则："
        ),
        "check_lead": (
            "这条评论值得模型学着说吗？一半是留下的，一半是清洗丢掉的，全部判断完才揭晓。"
            "哪怕它还不错，如果你不希望模型反复这么说，就选不值得。"
        ),
        "to_judge": "这条评论",
        "good": "值得学",
        "junk": "不值得",
        "back": "改上一条",
        "judged": "第 {number} 条，共 {count} 条",
        "unlabelled": "这一次没能写进 labels.jsonl，请检查目录是否可写，然后再选一次。",
        "precision": "丢得准不准（精确率）",
        "precision_help": "丢掉的里面，有多少确实不值得学。",
        "recall": "丢得全不全（召回率）",
        "recall_help": "所有不值得学的里面，有多少被丢掉了。",
        "left": "剩下的杂质",
        "left_help": "留下的里面，还有多少不值得学。",
        "share_of": "95% 区间 {low:.0%} – {high:.0%}",
        "unknown": "说不准",
        "low_precision": (
            "**丢得不准**，就是好评论被误删了：看下表里哪种原因误删得多，按最后一列放宽，再运行一次 prepare_data.py。"
        ),
        "low_recall": (
            "**丢得不全**，就是杂质漏掉了：看看漏掉的是什么。太短就调大 `--min_chars`，老一套就调小 `--max_repeats`，"
            "没人点赞就用 `--min_likes 3`，UP 主自己的就用 `--drop_uploader True`，别的语言就用 `--language zh`。"
        ),
        "wide": "区间还很宽？再判断一轮会窄一些。数据变了或参数变了，要重新判断。",
        "reason": "原因",
        "was_junk": "其中不值得学的",
        "loosen": "怎么放宽",
        "stayed": "漏掉的：留下来但你觉得不值得学的",
        "lost_good": "误删的：丢掉了但你觉得值得学的",
        "none": "（没有）",
        "again": "再判断一轮",
    },
    "en": {
        "comments": "Comments",
        "chat": "Chat",
        "training": "Training",
        "sampling": "Sampling",
        "temperature": "Temperature",
        "temperature_help": "Higher is wilder; 0 always takes the likeliest token.",
        "top_p": "top_p",
        "top_p_help": "Choose among the likeliest tokens that have this weight together.",
        "top_k": "top_k",
        "top_k_help": "Choose among the k likeliest tokens; 0 leaves it to the server.",
        "penalty": "Repetition penalty",
        "penalty_help": "Above 1 the model repeats itself less; 1 leaves it to the server.",
        "max_tokens": "Longest reply (tokens)",
        "seed": "Seed",
        "seed_help": "The same seed gives the same replies; empty: others each time.",
        "tuned_model": "Tuned model",
        "base_model": "Base model",
        "no_base": "(none)",
        "reload": "Connect again",
        "comments_lead": (
            "Give a video's title, its description and a comment, and "
            "read what the model replies, before and after tuning."
        ),
        "title": "Video title",
        "desc": "Video description (may be empty)",
        "parent": "Comment to answer (empty: a comment on the video itself)",
        "system": "System prompt",
        "count": "Replies",
        "example": "Fill in an example",
        "write": "Write replies",
        "no_title": "Please give the video's title first.",
        "greedy_one": "At temperature 0 all replies would be equal, so one is written.",
        "tuned": "Tuned",
        "base": "Base",
        "prompt_shown": "What the model reads",
        "stop": "Stop",
        "cut": "(cut at the longest reply)",
        "empty": "(an empty reply)",
        "stopped": "(stopped)",
        "left_out": "(The conversation is long: the model no longer sees its oldest exchanges, {count}.)",
        "chat_lead": "Talk with the model. It sees what was said before.",
        "speaker": "Talk with",
        "say": "Say something…",
        "clear": "Clear",
        "loading": "The model is being loaded …",
        "training_lead": "Curves and samples follow the run: its files are looked at every {seconds} seconds.",
        "run": "Folder of the run",
        "run_help": "Choose one, or type a path and press Enter.",
        "no_runs": "There is no training run yet. This command starts one, and it will show up here:",
        "no_metrics": "There is no metrics.jsonl in this folder:",
        "no_lines": "The run has just begun and has not written a step yet.",
        "bad_lines": "The files in this folder are not what this project writes:",
        "at_step": "At step {step}",
        "loss": "Loss",
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "speed": "Tokens per second",
        "train": "training, each step",
        "smooth": "training, smoothed",
        "eval": "held out",
        "step": "step",
        "samples": "Replies to held-out samples",
        "no_samples": "No samples yet. The model answers a few whenever the held-out loss is measured.",
        "sample_step": "Step",
        "newest": "newest (step {step})",
        "prompt": "Prompt",
        "reply": "Reply of the model",
        "real": "Real reply",
        "no_arguments": "No model was named at the start. Start again in one of these ways:",
        "wrong_arguments": "The arguments are not right. Please correct them in the terminal and start again.",
        "no_server": "The model could not be loaded.",
        "error_key": (
            "The server refuses the key (HTTP {status}). Check the environment "
            "variable that --api_key_env names, and start again."
        ),
        "error_missing": "The server does not know this model or address (HTTP 404). Check --api and the chosen model.",
        "error_busy": "The server is busy, or the account is empty (HTTP 429). Please try again in a while.",
        "error_loading": (
            "The server is not ready, it may still be loading the model (HTTP 503). Please try again in a while."
        ),
        "error_request": "The server refuses this request (HTTP {status}). It says:",
        "error_server": "The server failed (HTTP {status}). It says:",
        "error_connection": "No connection to {url}. The server may not run, or still be loading the model.",
        "error_timeout": "The server took too long to answer.",
        "error_broken": "The server's answer broke off, or makes no sense. It says:",
        "error_no_models": "The server lists no models.",
        "guess": "Real or written?",
        "guess_lead": "One reply is real, a model wrote the other one. **Which one did a person write?**",
        "no_evaluations": (
            "There are no replies to guess at yet. This command lets a model "
            "answer held-out comments, and they will show up here:"
        ),
        "evaluation": "Evaluation",
        "contenders": "Models to play against",
        "contenders_help": (
            "None chosen: all. With several you are told only after a guess which "
            "of them it was. Click on the page afterwards, so that keys work."
        ),
        "all_contenders": "all (blind)",
        "no_rounds": "This evaluation holds no replies to guess at.",
        "video": "Video",
        "answered": "Comment to answer",
        "pick_0": "① is a person's",
        "pick_1": "② is a person's",
        "is_real": "a person",
        "is_written": "a model",
        "guessed_right": "Right!",
        "guessed_wrong": "Wrong: the model took you in.",
        "next": "Next",
        "points": "Right",
        "streak": "In a row",
        "seen_before": (
            "You have met this comment before and may remember the real reply, so this guess will not count below."
        ),
        "unwritten": "This guess could not be written to guesses.jsonl, so it does not count for everybody's score.",
        "everybody": "Everybody's score",
        "me": "My score",
        "scores_help": (
            "50% means that nobody can tell; the lower, the more like a person. "
            "Of each visitor the first guess on a comment counts."
        ),
        "no_guesses": "No guesses yet.",
        "few_guesses": "Fewer than {count} guesses are too few to say.",
        "contender": "Model",
        "share": "Guessed right",
        "interval": "95% interval",
        "guesses": "Guesses",
        "data": "Data",
        "data_lead": "What prepare_data.py read and dropped, and what is left for the model.",
        "data_folder": "Folder of the data",
        "no_data": (
            "There is no prepared data yet. This command prepares the examples that come along; reload the page after "
            "it:"
        ),
        "no_report": "There is no report.json of prepare_data.py in this folder:",
        "bad_data": "The files here cannot be read. Prepare the data again:",
        "view": "What to see",
        "overview": "Overview",
        "by_chance": "Samples by chance",
        "search": "Search",
        "check": "Is the cleaning right?",
        "was_read": "Comments read",
        "for_training": "Kept for training",
        "for_test": "Kept for the test",
        "was_dropped": "Dropped",
        "of_videos": "videos: {count}",
        "what": "What became of them",
        "number": "Comments",
        "part": "Share of those read",
        "drop_examples": "Examples of each reason",
        "comment_length": "Length of comments (characters)",
        "prompt_length": "Length of prompts (characters)",
        "lengths": (
            "Half have {half} characters at most, 90% have {most}, the longest has {longest}. "
            "The last bar holds the longer ones too."
        ),
        "others": "Others",
        "desc_of": "Video description",
        "in_answers": "Kept comments",
        "in_prompts": "Kept prompts",
        "in_dropped": "Dropped comments",
        "search_where": "Where to look",
        "search_text": "Text to look for (Enter starts; A to Z in either case)",
        "searching": "Reading the files from beginning to end, 2 to 15 seconds for a million comments …",
        "hits": "{total} in all; these are the first {shown}.",
        "no_hits": "Nothing was found.",
        "no_dropped": "What was dropped was not stored. This command writes it to dropped.jsonl:",
        "nothing_cleaned": (
            "The cleaning dropped nothing, as with little and clean data, so there is nothing to check. To see what "
            "this page does, tighten a rule:"
        ),
        "check_lead": (
            "Should a model learn to say this? Half of these comments were kept, half were dropped by the cleaning; "
            "which is which is told at the end. If you would not want a model to say it again and again, it is junk, "
            "however nice."
        ),
        "to_judge": "This comment",
        "good": "Good",
        "junk": "Junk",
        "back": "Change the last one",
        "judged": "{number} of {count}",
        "unlabelled": (
            "This one could not be written to labels.jsonl. See whether the folder can be written to, and choose again."
        ),
        "precision": "Precision",
        "precision_help": "Of what was dropped, how much is junk.",
        "recall": "Recall",
        "recall_help": "Of all junk, how much was dropped.",
        "left": "Junk that is left",
        "left_help": "Of what was kept, how much is junk.",
        "share_of": "95% interval {low:.0%} – {high:.0%}",
        "unknown": "unknown",
        "low_precision": (
            "**A low precision** means that good comments were dropped. See in the table which reason does it, loosen "
            "that as its last column says, and run prepare_data.py again."
        ),
        "low_recall": (
            "**A low recall** means that junk stayed. See what it is: short texts call for a higher `--min_chars`, the "
            "same thing again and again for a lower `--max_repeats`, what nobody likes for `--min_likes 3`, the "
            "uploader's own comments for `--drop_uploader True`, other languages for `--language zh`."
        ),
        "wide": "Are the intervals wide? Judging another round narrows them. Other data or arguments begin anew.",
        "reason": "Reason",
        "was_junk": "Junk among them",
        "loosen": "To loosen it",
        "stayed": "Stayed, and you call it junk",
        "lost_good": "Dropped, and you call it good",
        "none": "(none)",
        "again": "Judge another round",
    },
}
# In English prepare_data.py has them.
ZH_DROPS = {
    "torn": "残缺的行",
    "duplicate": "和另一条记录重复",
    "empty": "没有文字（或只有 @）",
    "video_id_lost": "视频 id 丢失（被 Excel 舍入）",
    "video_missing": "视频不在文件里",
    "parent_unknown": "不知道回复的是谁（id 丢失，或爬取于 2024 年 5 月以前）",
    "parent_missing": "被回复的评论不在文件里，或没有文字",
    "contact": "联系方式或短链接（--contacts）",
    "bait": "“回复就发你”一类，和它的回复（--drop_bait）",
    "echo": "重复被回复的评论或标题（--drop_echo）",
    "uploader": "UP 主自己写的（--drop_uploader）",
    "language": "其他语言（--language）",
    "few_likes": "点赞太少（--min_likes）",
    "too_short": "太短（--min_chars）",
    "too_long": "太长（--max_chars）",
    "emoticons": "只有表情，同一视频下已经够多（--max_emoticons）",
    "repeat": "同样的话已经够多（--max_repeats）",
    "near_repeat": "几乎同样的话已经够多（--max_repeats）",
    "beyond_total": "超出 --total",
}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    """Raises what is wrong, so that the page can show it as well as the terminal."""

    def error(self, message: str) -> NoReturn:
        """Ends with what is wrong and what is expected."""
        raise SystemExit(f"{message}\n{self.format_usage().strip()}")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = Parser(
        prog=START,
        usage=f"{START} --model DIR [--adapter DIR | --base DIR]\n       {START} --api URL [--api_key_env NAME]",
        description="A page in the browser: replies to comments, a conversation, training runs, and the prepared data.",
        epilog="Streamlit's own arguments, such as --server.address 127.0.0.1 --server.port 6006, go before the --. "
        "Without --model and --api there are data and training runs to look at, and replies to guess at.",
    )
    parser.add_argument("--model", help="folder of a model, such as output_hf/BiliComments; it is served from here")
    parser.add_argument("--adapter", help="folder of an adapter on --model, which is the base then")
    parser.add_argument("--base", help="folder of the model to compare --model with")
    parser.add_argument("--api", help="an OpenAI-compatible API to use instead, such as http://127.0.0.1:8000")
    parser.add_argument("--api_key_env", help="environment variable that holds the key of --api")
    return parser


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Reads the arguments.

    Raises:
        SystemExit: with what is wrong with them.
    """
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.api and (args.model or args.adapter or args.base):
        parser.error("--api: --model, --adapter and --base cannot be given too. The page lets choose what it offers.")
    if (args.adapter or args.base) and not args.model:
        parser.error("--adapter and --base belong to a --model.")
    if args.adapter and args.base:
        parser.error("--base: --model without its --adapter is the base already.")
    if args.api and not is_address(args.api):
        parser.error("--api: expected an address such as http://127.0.0.1:8000 or https://api.example.com/v1.")
    if args.api_key_env and not args.api:
        parser.error("--api_key_env belongs to an --api.")
    if args.api_key_env:
        key = os.environ.get(args.api_key_env, "")
        if not (key and key.isascii() and key.isprintable()):
            parser.error(f"{args.api_key_env} holds no key. Set it before the start: export {args.api_key_env}=...")
    return args


def is_address(text: str) -> bool:
    """Whether a server can be found there."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# The API


class Model(NamedTuple):
    """What can be asked.

    Attributes:
        url: Of the API.
        key: For it.
        name: There.
        system_prompt: Of its training data; None if it was not trained by this project.
    """

    url: str
    key: str
    name: str
    system_prompt: str | None


class Problem(NamedTuple):
    """What went wrong: a text of `TEXTS` with what is to be put in, and what the server said."""

    text: str
    values: dict[str, Any]
    said: str = ""


def problem_of(error: Exception, url: str, key: str) -> Problem:
    """Finds the words for an error of the client, or for what came from a server that is none of these APIs."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return Problem("error_timeout", {})
    if isinstance(error, openai.APIConnectionError):
        return Problem("error_connection", {"url": urlsplit(url).netloc.rpartition("@")[2]})
    said = str(error) or type(error).__name__
    if isinstance(error, openai.APIError):
        said = str((isinstance(error.body, dict) and error.body.get("message")) or error.message)
    said = re.sub(r"\bsk-\S+", "***", said.replace(key, "***"))[:500]
    if not isinstance(error, openai.APIStatusError):
        return Problem("error_broken", {}, said)
    status = error.status_code
    if status in (401, 403):
        return Problem("error_key", {"status": status})  # What it says may repeat a part of the key.
    known = {404: "error_missing", 429: "error_busy", 503: "error_loading"}
    return Problem(known.get(status, "error_server" if status >= 500 else "error_request"), {"status": status}, said)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever an answer redirects."""

    def redirect_request(self, *_: Any) -> None:
        return None  # The redirect is an error then.


def offered(url: str, key: str) -> dict[str, str | None]:
    """Asks a server what it offers.

    Args:
        url: Of the API, with /v1.
        key: For it.

    Returns:
        Models' names and the system prompts that they were trained with. Only this project's server tells these (None
        for models that were not trained here); of others it is taken for granted that they serve what was trained here.
    """

    async def names() -> list[str]:
        async with make_client(url, key, max_retries=0, timeout=20) as client:
            return [model.id async for model in client.models.list()]

    prompts: dict[str, str | None] = dict.fromkeys(asyncio.run(names()), SYSTEM_PROMPT)
    proxies = urllib.request.ProxyHandler({} if is_local(url) else None)
    health = urllib.request.Request(url.removesuffix("/v1") + "/health", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.build_opener(proxies, _NoRedirects).open(health, timeout=5) as answer:
            told = {model["name"]: model["system_prompt"] for model in json.load(answer)["models"]}
    except (OSError, ValueError, LookupError, TypeError):
        told = {}
    return prompts | {name: told[name] for name in prompts.keys() & told.keys()}


def messages_of(system: str, *texts: str) -> list[dict[str, str]]:
    """Writes a conversation: a system text, if any, then user and assistant by turns."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def request_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Writes the sampling settings as the API's options; unset ones are left out, as not every server knows them.

    Args:
        settings: temperature, top_p, top_k (0: none), penalty (1: none), max_tokens and seed (None: none).
    """
    options = {name: settings[name] for name in ("temperature", "top_p", "max_tokens")}
    if settings["seed"] is not None:
        options["seed"] = settings["seed"]
    more = {"top_k": settings["top_k"]} if settings["top_k"] else {}
    more |= {"repetition_penalty": settings["penalty"]} if settings["penalty"] != 1 else {}
    return options | ({"extra_body": more} if more else {})


def new_answer(model: Model, count: int) -> dict[str, Any]:
    """Placeholders for the replies.

    Returns:
        "texts", as far as they have come; "ends", why each of them ended, None before; "problem", if there is one.
    """
    return {"model": model.name, "texts": [""] * count, "ends": [None] * count, "problem": None, "left_out": 0}


async def ask(model: Model, messages: list[dict[str, str]], options: dict[str, Any], answer: dict[str, Any]) -> None:
    """Asks a model and writes down what it says, piece by piece.

    Args:
        model: What to ask.
        messages: A conversation.
        options: From `request_options`.
        answer: From `new_answer`; it is filled.
    """
    from openai import BadRequestError

    count = len(answer["texts"])
    try:
        async with make_client(model.url, model.key, max_retries=0) as client:
            create = partial(client.chat.completions.create, model=model.name, stream=True)
            several = {"n": count} if count > 1 else {}
            while True:
                try:
                    stream = await create(**options, **several, messages=messages)
                    break
                except BadRequestError as error:
                    shorter = without_oldest(messages)
                    if not TOO_LONG.search(str(error)) or shorter is None:
                        raise
                    messages, answer["left_out"] = shorter, answer["left_out"] + 1
            await _read(stream, answer, 0)
            # Some servers know nothing of n. Another seed, or each would say the same.
            for number in range(1, count):
                if answer["ends"][number] is None and not answer["texts"][number]:
                    seed = {"seed": options["seed"] + number} if "seed" in options else {}
                    await _read(await create(**options | seed, messages=messages), answer, number)
    except Exception as error:  # Any server may send anything; the page goes on.
        answer["problem"] = problem_of(error, model.url, model.key)


def without_oldest(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """A conversation without its oldest exchange; None if there is only the question."""
    first = messages[0]["role"] == "system"
    return [*messages[:first], *messages[first + 2 :]] if len(messages) > first + 2 else None


async def _read(stream: Any, answer: dict[str, Any], first: int) -> None:
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices or []:
                number = first + choice.index
                answer["texts"][number] += (choice.delta and choice.delta.content) or ""
                answer["ends"][number] = choice.finish_reason or answer["ends"][number]


def working(jobs: list[Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Runs jobs in threads and yields regularly, so that the caller can draw. Closing the iterator ends them."""
    with asyncio.Runner() as runner:
        tasks = [runner.get_loop().create_task(job) for job in jobs]
        while not all(task.done() for task in tasks):
            runner.run(asyncio.wait(tasks, timeout=DRAW_SEC))
            yield
        for task in tasks:
            task.result()


# ---------------------------------------------------------------------------------------------------------------------
# What all pages have


def choose_language() -> str:
    """The language switch; the address carries the choice, so that it outlives a reload and goes with a link."""
    import streamlit as st

    if "lang" not in st.session_state:
        asked, browser = st.query_params.get("lang"), (st.context.locale or "").lower()
        st.session_state["lang"] = asked if asked in TEXTS else "zh" if browser.startswith("zh") else "en"
    lang = st.sidebar.segmented_control(
        "语言 / Language", [*TEXTS], key="lang", format_func={"zh": "中文", "en": "English"}.get, required=True
    )
    st.query_params["lang"] = lang
    return lang


def show_problem(t: dict[str, str], problem: Problem) -> None:
    """Says what went wrong; the server's own words as plain text."""
    import streamlit as st

    st.error(t[problem.text].format(**problem.values))
    if problem.said:
        st.text(problem.said)


def sampling(t: dict[str, str]) -> dict[str, Any]:
    """The controls of how is sampled, in the sidebar."""
    import streamlit as st

    kept = {"persist_state": "session"}
    with st.sidebar:
        st.subheader(t["sampling"])
        return {
            "temperature": st.slider(
                t["temperature"], 0.0, 2.0, 0.8, 0.05, key="temperature", help=t["temperature_help"], **kept
            ),
            "top_p": st.slider("top_p", 0.05, 1.0, 0.95, 0.05, key="top_p", help=t["top_p_help"], **kept),
            "top_k": st.number_input("top_k", 0, 1000, 0, key="top_k", help=t["top_k_help"], **kept),
            "penalty": st.slider(t["penalty"], 0.5, 2.0, 1.0, 0.05, key="penalty", help=t["penalty_help"], **kept),
            "max_tokens": st.number_input(t["max_tokens"], 1, 8192, 256, key="max_tokens", **kept),
            "seed": st.number_input(t["seed"], 0, 2**53 - 1, None, key="seed", help=t["seed_help"], **kept),
        }


def start_server(arguments: tuple[str, ...]) -> str:
    """Starts this project's server in this process; returns its address."""
    from serve import serve_in_background

    return serve_in_background([*arguments])


def served(t: dict[str, str], folder: str, adapter: str | None = None) -> list[Model]:
    """Serves a model's folder, once for all visitors; the last of the models is the tuned one, if there is one."""
    import streamlit as st

    arguments = ["--model", str(from_root(folder))]
    arguments += ["--adapter", f"{TUNED}={from_root(adapter)}"] if adapter else []
    with st.spinner(t["loading"]):
        try:
            url = st.cache_resource(start_server, show_spinner=False)(tuple(arguments))
        except SystemExit as end:
            print(end.code, file=sys.stderr)
            st.error(t["no_server"])
            st.text(end.code)
            st.stop()
    names = list_models(t, url, "none")
    return sorted(names, key=lambda model: model.name == TUNED)


def list_models(t: dict[str, str], address: str, key: str) -> list[Model]:
    """What a server offers; without an answer the page ends here."""
    import streamlit as st

    url = address.rstrip("/") + ("" if urlsplit(address).path.strip("/") else "/v1")
    try:
        names = st.cache_resource(offered, ttl=60, show_spinner=False)(url, key)
    except Exception as error:  # As in `ask`.
        show_problem(t, problem_of(error, url, key))
        st.button(t["reload"])
        st.stop()
    if not names:
        show_problem(t, Problem("error_no_models", {}))
        st.stop()
    return [Model(url, key, name, system_prompt) for name, system_prompt in names.items()]


def find_models(t: dict[str, str], args: argparse.Namespace) -> tuple[Model, Callable[[], Model] | None]:
    """The tuned model, and the base model if there is one; with --api the visitor chooses both."""
    import streamlit as st

    if args.model:
        models = served(t, args.model, args.adapter)
        if args.base:
            return models[-1], lambda: served(t, args.base)[-1]
        return models[-1], (lambda: models[0]) if len(models) > 1 else None
    if not args.api:
        st.info(t["no_arguments"])
        st.code(f"{START} --model output_hf/BiliComments\n{START} --api http://127.0.0.1:8000", language="sh")
        st.stop()
    models = list_models(t, args.api, os.environ[args.api_key_env] if args.api_key_env else "none")
    names = [model.name for model in models]
    with st.sidebar:
        # Servers list an adapter behind its base.
        kept = {"persist_state": "session"}
        tuned = st.selectbox(t["tuned_model"], names, len(names) - 1, key="tuned_model", **kept)
        base = ""
        if len(names) > 1:
            choices = ["", *names]
            base = st.selectbox(
                t["base_model"], choices, 1, key="base_model", format_func=lambda name: name or t["no_base"], **kept
            )
    by_name = dict(zip(names, models, strict=True))
    return by_name[tuned], (lambda: by_name[base]) if base else None


def show_answer(t: dict[str, str], answer: dict[str, Any], ended: bool, border: bool) -> list[tuple[Any, Any]]:
    """Shows the replies of one model, as far as they have come, each with or without a border.

    Returns:
        Where each of them and a note on it stand, for `draw_answer`.
    """
    import streamlit as st

    places = []
    for text, end in zip(answer["texts"], answer["ends"], strict=True):
        missing = answer["problem"] and not text and end is None
        with st.container(border=border and not missing):
            places.append((st.empty(), st.empty()))
    draw_answer(t, answer, places, ended)
    if answer["problem"]:
        show_problem(t, answer["problem"])
    return places


def showable(text: str) -> str:
    """A text that can be shown: servers may send the two halves of an emoji one by one, and half of one cannot be."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def comment_parts(messages: list[dict[str, str]]) -> tuple[str, str, str]:
    """Title, description and comment to answer: the lines of `comment_prompt` without their names.

    The page has the names in the reader's language. Of conversations of other kinds all is in the first one.
    """
    video, parent = map(showable, parts_of(messages))
    title, _, desc = video.removeprefix("视频标题：").partition("\n视频简介：")
    return title, desc, parent.removeprefix("父评论：")


def stamp_of(path: Path) -> tuple[int, int]:
    """Changes whenever a file does."""
    try:
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    except OSError:
        return 0, 0


def draw_answer(t: dict[str, str], answer: dict[str, Any], places: list[tuple[Any, Any]], ended: bool) -> None:
    """Writes replies as they are by now."""
    for text, end, (place, note) in zip(answer["texts"], answer["ends"], places, strict=True):
        coming = end is None and not ended
        text = showable(text)
        place.text(text + "▌" if coming else text)
        if answer["left_out"] and ended:
            note.caption(t["left_out"].format(count=answer["left_out"]))
        elif end == "length":
            note.caption(t["cut"])
        elif end is not None and not text.strip():
            note.caption(t["empty"])
        elif end is None and not coming and not answer["problem"]:
            note.caption(t["stopped"])


def follow(
    t: dict[str, str], answers: list[dict[str, Any]], places: list[Any], jobs: list[Coroutine[Any, Any, None]]
) -> None:
    """Draws what comes until all of it is there, or the reader presses a button (Streamlit then leaves this function).

    Args:
        t: The texts.
        answers: What is to be drawn.
        places: Where, from `show_answer`.
        jobs: Which fill the answers.
    """
    import streamlit as st

    with st.session_state["following"], closing(working(jobs)) as looks:
        for _ in looks:
            for answer, place in zip(answers, places, strict=True):
                draw_answer(t, answer, place, ended=False)
    st.rerun()


# ---------------------------------------------------------------------------------------------------------------------
# Comments


def fill_in_example() -> None:
    """Puts an example into the form."""
    import streamlit as st

    st.session_state.update(EXAMPLE)


def comment_form(t: dict[str, str], model: Model) -> tuple[str, bool]:
    """Asks for a video and a comment, into the session's state.

    Returns:
        The system text for the model, and whether replies are asked for now.
    """
    import streamlit as st

    kept = {"persist_state": "session"}
    with st.form("comment"):
        st.text_input(t["title"], key="title", **kept)
        st.text_area(t["desc"], key="desc", height=110, **kept)
        st.text_area(t["parent"], key="parent", height=80, **kept)
        with st.expander(t["system"]):
            trained = SYSTEM_PROMPT if model.system_prompt is None else model.system_prompt
            key = f"comment system of {model.name}"
            system = st.text_area(t["system"], trained, key=key, label_visibility="collapsed", **kept)
        st.slider(t["count"], 1, MOST_REPLIES, 3, key="count", **kept)
        with st.container(horizontal=True):
            written = st.form_submit_button(t["write"], type="primary")
            st.form_submit_button(t["example"], on_click=fill_in_example)
    return system, written


def comments_page(args: argparse.Namespace, t: dict[str, str]) -> None:
    """Replies to a comment, before and after tuning."""
    import streamlit as st

    st.title(t["comments"])
    st.write(t["comments_lead"])
    tuned, base = find_models(t, args)
    settings = sampling(t)
    left, right = st.columns([2, 3], gap="large")
    with left:
        system, written = comment_form(t, tuned)
    with right:
        state = st.session_state
        if written and not state["title"].strip():
            st.warning(t["no_title"])
            return
        jobs = []
        if written:
            models = ([("base", base())] if base else []) + [("tuned", tuned)]
            # Where nothing is left to chance all of them would be the same, and some servers refuse to write several.
            state["greedy"] = state["count"] > 1 and not settings["temperature"]
            count = 1 if state["greedy"] else state["count"]
            question = comment_prompt(state["title"], state["desc"], state["parent"])
            messages, options = messages_of(system, question), request_options(settings)
            state["prompt"], state["sides"] = messages, [side for side, _ in models]
            state["replies"] = [new_answer(model, count) for _, model in models]
            jobs = [
                ask(model, messages, options, answer)
                for (_, model), answer in zip(models, state["replies"], strict=True)
            ]
        if "replies" in state:
            show_replies(t, jobs)


def show_replies(t: dict[str, str], jobs: list[Coroutine[Any, Any, None]]) -> None:
    """Shows the replies to a comment side by side, those that `jobs` are fetching as they come."""
    import streamlit as st

    state, stop = st.session_state, st.empty()
    if jobs:
        stop.button(t["stop"], key="stop")
    if state["greedy"]:
        st.caption(t["greedy_one"])
    places = []
    for column, side, answer in zip(st.columns(len(state["sides"])), state["sides"], state["replies"], strict=True):
        with column:
            st.markdown(f"#### {t[side]}")
            st.text(answer["model"])
            places.append(show_answer(t, answer, ended=not jobs, border=True))
    with st.expander(t["prompt_shown"]):
        for message in state["prompt"]:
            st.text(message["content"])
    if jobs:
        follow(t, state["replies"], places, jobs)


# ---------------------------------------------------------------------------------------------------------------------
# Chat


def clear_chat() -> None:
    """Forgets the conversation."""
    import streamlit as st

    st.session_state["turns"] = []


def chat_page(args: argparse.Namespace, t: dict[str, str]) -> None:
    """A conversation."""
    import streamlit as st

    st.title(t["chat"])
    st.write(t["chat_lead"])
    model, base = find_models(t, args)
    kept = {"persist_state": "session"}
    with st.sidebar:
        if base:
            sides = ["tuned", "base"]
            side = st.radio(t["speaker"], sides, key="speaker", format_func=t.get, horizontal=True, **kept)
            model = base() if side == "base" else model
        system = st.text_area(t["system"], model.system_prompt or "", key=f"system of {model.name}", **kept)
        st.button(t["clear"], on_click=clear_chat)
    settings = sampling(t)
    turns = st.session_state.setdefault("turns", [])
    for turn in turns:
        show_turn(t, turn)
    if text := st.chat_input(t["say"]):
        # A question without an answer, since it was stopped or something went wrong, is not part of what was said.
        replies = [(turn["question"], turn["answer"]["texts"][0]) for turn in turns]
        left_out = max((turn["answer"]["left_out"] for turn in turns), default=0)
        said = [part for question, reply in replies if reply for part in (question, reply)][2 * left_out :]
        answer = new_answer(model, 1) | {"left_out": left_out}
        turns.append({"question": text, "answer": answer})
        job = ask(model, messages_of(system, *said, text), request_options(settings), answer)
        places = show_turn(t, turns[-1], ended=False)
        st.button(t["stop"], key="stop")
        follow(t, [answer], [places], [job])


def show_turn(t: dict[str, str], turn: dict[str, Any], ended: bool = True) -> list[tuple[Any, Any]]:
    """Shows a question and its answer; returns where the answer stands."""
    import streamlit as st

    with st.chat_message("user"):
        st.text(turn["question"])
    with st.chat_message("assistant"):
        return show_answer(t, turn["answer"], ended, border=False)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def of_files(name: str, folder: Path, *arguments: str) -> Any:
    """Calls a function of `utils.data.prepared` on a folder; what it gave is kept until one of its files changes."""
    import streamlit as st

    stamps = tuple(stamp_of(folder / name) for name in prepared.FILES)
    return st.cache_resource(_call, max_entries=64, show_spinner=False)(name, stamps, folder, *arguments)


def _call(name: str, stamps: tuple[tuple[int, int], ...], folder: Path, *arguments: str) -> Any:
    return getattr(prepared, name)(folder, *arguments)


def prepared_folders() -> list[Path]:
    """Folders that prepare_data.py wrote into, its default first, then the newest."""
    root = from_root("")
    found = [path for pattern in ("*/report.json", "*/*/report.json") for path in root.glob(pattern)]
    found.sort(key=lambda path: (path.parent != root / "data", -path.stat().st_mtime))
    return [path.parent for path in found if of_files("is_prepared", path.parent)]


def prepare_again(data: prepared.Prepared) -> str:
    """The command that prepares the same data again and writes down what it drops."""
    from prepare_data import build_parser as parser_of_data

    usual, places = parser_of_data(), {"output_dir": shown(data.folder), "write_dropped": True}
    given = data.arguments | places
    texts = [
        f" --{name} {shlex.quote(str(value))}"
        for name, value in given.items()
        if name in places or (value is not None and value != usual.get_default(name))
    ]
    return "python prepare_data.py" + "".join(texts)


def drop_names(t: dict[str, str]) -> dict[str, str]:
    """Reason -> its words."""
    from prepare_data import DROPS

    return ZH_DROPS if t is TEXTS["zh"] else DROPS


def data_page(t: dict[str, str]) -> None:
    """What prepare_data.py read, kept and dropped, and whether its cleaning is right."""
    import streamlit as st

    st.title(t["data"])
    st.write(t["data_lead"])
    options = [shown(path) for path in prepared_folders()]
    if st.session_state.get("data_folder", "") is None:
        del st.session_state["data_folder"]  # There was none yet.
    chosen = st.selectbox(
        t["data_folder"],
        options,
        accept_new_options=True,
        key="data_folder",
        help=t["run_help"],
        persist_state="session",
    )
    if chosen is None:
        st.info(t["no_data"])
        st.code("python prepare_data.py --data_dir examples --write_dropped True", language="sh")
        return
    try:
        data = of_files("read_prepared", from_root(chosen))
    except (ValueError, RuntimeError):  # For ~ and a name that nobody has, and characters that no path has.
        st.warning(t["no_report"])
        st.text(chosen)
        return
    views = {"overview": show_counts, "by_chance": show_by_chance, "search": show_search, "check": show_check}
    view = st.segmented_control(
        t["view"], [*views], default="overview", key="view", format_func=t.get, required=True,
        label_visibility="collapsed", persist_state="session",
    )  # fmt: skip
    try:
        views[view](t, data)
    except DataError as error:
        st.warning(t["bad_data"])
        st.code(prepare_again(data), language="sh")
        st.text(str(error))


def show_counts(t: dict[str, str], data: prepared.Prepared) -> None:
    """Shows what was read, kept and dropped, and how long the texts are."""
    import streamlit as st

    from prepare_data import quantile

    names, dropped = drop_names(t), {reason: count for reason, count in data.dropped.items() if count}
    columns = st.columns(4)
    columns[0].metric(t["was_read"], f"{data.read:,}")
    counts = {}
    for column, name, split in zip(columns[1:], ("for_training", "for_test"), data.splits.values(), strict=False):
        counts[t[name]] = split["comments"]
        column.metric(t[name], f"{split['comments']:,}")
        column.caption(t["of_videos"].format(count=f"{split['videos']:,}"))
    columns[3].metric(t["was_dropped"], f"{sum(dropped.values()):,}")
    counts |= {names.get(reason, reason): count for reason, count in dropped.items()}
    rows = [{t["what"]: name, t["number"]: n, t["part"]: 100 * n / data.read} for name, n in counts.items()]
    bar = st.column_config.ProgressColumn(format="%.1f%%", min_value=0, max_value=100)
    st.dataframe(rows, hide_index=True, column_config={t["part"]: bar}, height="content")
    with st.expander(t["drop_examples"]):
        for reason, examples in data.examples.items():
            st.text(names.get(reason, reason))
            for text in examples:
                st.container(border=True).text(showable(text))
    for column, (name, lengths) in zip(st.columns(2), data.lengths.items(), strict=True):
        title = t["comment_length" if name == "comment" else "prompt_length"]
        column.vega_lite_chart(spec=length_chart(t, title, lengths), height=220, key=f"{name} lengths")
        half, most = quantile(lengths, 0.5), quantile(lengths, 0.9)
        column.caption(t["lengths"].format(half=half, most=most, longest=max(lengths)))


def length_chart(t: dict[str, str], title: str, lengths: dict[int, int]) -> dict[str, Any]:
    """Describes a chart of how many texts have which length."""
    from prepare_data import quantile

    bars = prepared.bars(lengths, quantile(lengths, 0.99))
    return {
        "title": title,
        "data": {"values": [{"from": first, "to": end, "count": count} for first, end, count in bars]},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "bin": "binned", "title": None},
            "x2": {"field": "to"},
            "y": {"field": "count", "type": "quantitative", "title": t["number"]},
        },
    }


def draw_others() -> None:
    """Asks for other samples."""
    import streamlit as st

    st.session_state["samples_drawn"] = st.session_state.get("samples_drawn", 0) + 1


def show_by_chance(t: dict[str, str], data: prepared.Prepared) -> None:
    """Shows some training records as the model gets them."""
    import streamlit as st

    lines = of_files("kept_lines", data.folder)[:1]
    st.button(t["others"], on_click=draw_others, type="primary")
    random = Random(f"{data.mark} {st.session_state.get('samples_drawn', 0)}")
    numbers = prepared.in_random_order(random, prepared.size_of(lines), FEW_SAMPLES)
    for messages in prepared.messages_at(lines, numbers):
        with st.container(border=True):
            title, desc, answered = comment_parts(messages)
            show_parts(t, {"video": title, "desc_of": desc, "answered": answered, "real": messages[-1]["content"]})
            with st.expander(t["prompt_shown"]):
                for message in messages:
                    st.caption(message["role"])
                    st.text(message["content"])


def show_parts(t: dict[str, str], texts: dict[str, str]) -> None:
    """Shows texts below what they are called; empty ones are left out."""
    import streamlit as st

    for name, text in texts.items():
        if text:
            st.caption(t[name])
            st.text(text)


def show_search(t: dict[str, str], data: prepared.Prepared) -> None:
    """Looks for a text in what was kept, or in what was dropped."""
    import streamlit as st

    places = {"answer": t["in_answers"], "prompt": t["in_prompts"], "dropped": t["in_dropped"]}
    where = st.segmented_control(
        t["search_where"], [*places], default="answer", key="search_where", format_func=places.get, required=True,
        persist_state="session",
    )  # fmt: skip
    if where == "dropped" and not data.has_dropped:
        st.info(t["no_dropped"])
        st.code(prepare_again(data), language="sh")
        return
    wanted = st.text_input(t["search_text"], key="search_text", max_chars=200, persist_state="session").strip()
    if not wanted:
        return
    with st.spinner(t["searching"]):
        hits = of_files("search", data.folder, where, wanted)
    if not hits.total:
        st.info(t["no_hits"])
        return
    st.caption(t["hits"].format(total=f"{hits.total:,}", shown=len(hits.first)))
    for about, text in hits.first:
        with st.container(border=True):
            left, right = st.columns([2, 3])
            left.text(showable(drop_names(t).get(about, about) if where == "dropped" else about))
            right.text(showable(text))


def show_check(t: dict[str, str], data: prepared.Prepared) -> None:
    """Lets a reader judge texts without saying which were dropped, then says how good the cleaning is."""
    import streamlit as st

    if not data.cleaned:
        st.info(t["nothing_cleaned"])
        st.code(f"{prepare_again(data)} --min_chars 12", language="sh")
        return
    if not data.has_dropped:
        st.info(t["no_dropped"])
        st.code(prepare_again(data), language="sh")
        return
    state, path = st.session_state.setdefault(f"check {data.mark}", new_check()), data.folder / LABELS
    labels = st.cache_resource(read_ticks, max_entries=8, show_spinner=False)(path, stamp_of(path), data.mark)
    draws = max([state["draws"], *(label["draw"] + 1 for label in labels.values())])
    kept, cleaned = of_files("kept_lines", data.folder), of_files("cleaned_lines", data.folder)
    drawn = prepared.draw_records(data.mark, kept, cleaned, draws)
    missing = [number for number, each in enumerate(drawn) if each.id not in labels]
    if state["at"] is None and not missing:
        show_quality(t, data, drawn, labels)
        st.button(t["again"], on_click=state.update, kwargs={"draws": draws + 1})
    else:
        show_drawn(t, data.mark, state, drawn, missing[0] if state["at"] is None else state["at"], path)


def new_check() -> dict[str, Any]:
    """What a visitor's page remembers of a check.

    Returns:
        "draws", how many are asked for; "at", the number of the text that is judged again, None otherwise;
        "unlabelled", whether the last judgement could not be stored.
    """
    return {"draws": 1, "at": None, "unlabelled": False}


def read_ticks(path: Path, stamp: tuple[int, int], mark: str) -> dict[str, dict[str, Any]]:
    """Reads what readers judged, as `read_rounds` does."""
    return prepared.read_labels(path, mark)


def take_label(path: Path, mark: str, state: dict[str, Any], asked: prepared.Drawn, junk: bool) -> None:
    """Writes down what a reader said of a text."""
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "data": mark, "draw": asked.draw, "id": asked.id}
    try:
        append_line(path, row | {"reason": asked.reason, "junk": junk})
        state |= {"at": None, "unlabelled": False}
    except OSError as error:
        print(f"{shown(path)}: {error}", file=sys.stderr)
        state["unlabelled"] = True


def show_drawn(
    t: dict[str, str], mark: str, state: dict[str, Any], drawn: list[prepared.Drawn], at: int, path: Path
) -> None:
    """Shows a comment to judge; nothing on the page tells whether it was dropped."""
    import streamlit as st

    st.write(t["check_lead"])
    st.html(STYLE)
    st.progress(at / len(drawn), t["judged"].format(number=at + 1, count=len(drawn)))
    asked = drawn[at]
    turns = [("user", asked.prompt), ("assistant", asked.text)]
    title, _, answered = comment_parts([{"role": role, "content": text} for role, text in turns])
    with st.container(border=True, height=320):  # Of one height, so that the buttons stay.
        show_parts(t, {"video": title, "answered": answered})
        st.caption(t["to_judge"])
        st.container(key="reply_0").text(showable(asked.text))
    # Not the arrows, with which one goes from view to view after having chosen this one.
    for column, (name, key) in zip(st.columns(2), (("good", "1"), ("junk", "2")), strict=True):
        column.button(
            t[name],
            key=f"tick {name}",
            shortcut=key,
            width="stretch",
            type="primary",
            on_click=take_label,
            args=(path, mark, state, asked, name == "junk"),
        )
    if at:
        st.button(t["back"], key="back", on_click=state.update, kwargs={"at": at - 1})
    if state["unlabelled"]:
        st.warning(t["unlabelled"])


def show_quality(
    t: dict[str, str], data: prepared.Prepared, drawn: list[prepared.Drawn], labels: dict[str, dict[str, Any]]
) -> None:
    """Shows precision and recall, what to do about them, and where the cleaning and the reader differ."""
    import streamlit as st

    judged = [(each, labels[each.id]["junk"]) for each in drawn]
    sides = [[junk for each, junk in judged if bool(each.reason) == dropped] for dropped in (True, False)]
    found = prepared.quality(*sides, data.cleaned, data.passed)
    names = {"precision": "precision_help", "recall": "recall_help", "left": "left_help"}
    for column, (name, explained), share in zip(st.columns(3), names.items(), found, strict=True):
        value = t["unknown"] if share.value is None else f"{share.value:.0%}"
        column.metric(t[name], value, help=t[explained])
        column.caption(t["share_of"].format(low=share.low, high=share.high))
    for name in ("low_precision", "low_recall", "wide"):
        st.write(t[name])
    total, junk_of = Counter(each.reason for each, _ in judged), Counter(each.reason for each, junk in judged if junk)
    rows = [
        {
            t["reason"]: name,
            t["number"]: total[reason],
            t["was_junk"]: junk_of[reason],
            t["loosen"]: prepared.looser(reason, data.arguments),
        }
        for reason, name in drop_names(t).items()
        if total[reason]
    ]
    st.dataframe(rows, hide_index=True)
    for column, name, dropped in zip(st.columns(2), ("lost_good", "stayed"), (True, False), strict=True):
        with column.expander(t[name]):
            for text in [each.text for each, junk in judged if bool(each.reason) == dropped != junk] or [t["none"]]:
                st.container(border=True).text(showable(text))


# ---------------------------------------------------------------------------------------------------------------------
# Training


class TailReader:
    """The lines of a JSON-lines file that grows: what was read is not read again.

    A line that is not finished is left for the next time. A file that was replaced, as a run does that goes on from an
    earlier step, is read anew.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._file: tuple[int, int] | None = None
        self._read_bytes = 0
        self._lines: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All lines up to now.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not what `utils.train.tracking` writes.
        """
        with self._lock, self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._read_bytes:
                self._file, self._read_bytes, self._lines = (status.st_dev, status.st_ino), 0, []
            file.seek(self._read_bytes)
            whole = file.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
            if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
                raise ValueError("a line without a step")
            self._lines += lines
            self._read_bytes += len(whole)
            return [*self._lines]


def runs() -> list[Path]:
    """The folders of all runs below deepspeed_*/output, the newest first."""
    found = from_root("").glob("deepspeed_*/output/**/metrics.jsonl")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def downsampled(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Not more points than a chart can show, the last one among them."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::stride][::-1]


def chart(t: dict[str, str], title: str, curves: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Describes a chart for Vega-Lite.

    Args:
        t: The texts.
        title: Above it.
        curves: Name -> points; drawn in grey, blue and orange where there are three, in blue where it is one. The last
            one's points are marked, if there are not too many.
    """
    several = len(curves) > 1
    colours = ["#b8bcc4", "#1f77b4", "#ff7f0e"] if several else ["#1f77b4"]
    values = [
        {"step": step, "value": value, "curve": name}
        for name, points in curves.items()
        for step, value in downsampled(points)
    ]
    last = [*curves][-1]
    marked = {"field": "curve", "oneOf": [last] if len(curves[last]) < 100 else []}
    step = {"field": "step", "type": "quantitative", "title": t["step"] if several else None}
    return {
        "title": title,
        "data": {"values": values},
        "layer": [
            {"mark": {"type": "line", "tooltip": True}},
            {"mark": {"type": "point", "filled": True, "tooltip": True}, "transform": [{"filter": marked}]},
        ],
        "encoding": {
            "x": step | {"axis": {"tickMinStep": 1}},
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": {
                "field": "curve",
                "type": "nominal",
                "scale": {"domain": [*curves], "range": colours},
                "legend": {"orient": "top", "title": None} if several else None,
            },
        },
    }


def training_page(t: dict[str, str]) -> None:
    """Curves and samples of a run, as it goes on."""
    import streamlit as st

    st.title(t["training"])
    st.write(t["training_lead"].format(seconds=FOLLOW_SEC))
    options = [shown(path) for path in runs()]
    chosen = st.selectbox(
        t["run"], options, accept_new_options=True, key="run", help=t["run_help"], persist_state="session"
    )
    if chosen is None:
        st.info(t["no_runs"])
        st.code("bash deepspeed_ft/run.sh", language="sh")

    @st.fragment(run_every=FOLLOW_SEC)
    def follow_run() -> None:
        if chosen is not None:
            show_run(t, chosen)
        elif runs():
            st.rerun()  # The first one has begun.

    follow_run()


def show_run(t: dict[str, str], folder: str) -> None:
    """Draws a run's metrics and samples so far."""
    import streamlit as st

    tail = st.cache_resource(TailReader, max_entries=32, show_spinner=False)
    try:
        path = from_root(folder)
        metrics = tail(path / "metrics.jsonl").read()
        samples = tail(path / "samples.jsonl").read() if (path / "samples.jsonl").exists() else []
    except (OSError, RuntimeError):  # The latter for ~ and a name that nobody has.
        st.warning(t["no_metrics"])
        st.text(folder)
        return
    except ValueError:
        st.warning(t["bad_lines"])
        st.text(folder)
        return
    if not metrics:
        st.info(t["no_lines"])
        return
    st.caption(t["at_step"].format(step=metrics[-1]["step"]))
    train = curve(metrics, "train/loss")
    losses = {t["train"]: train, t["smooth"]: smoothed(train), t["eval"]: curve(metrics, "eval/loss")}
    st.vega_lite_chart(spec=chart(t, t["loss"], losses), height=320, key="loss")
    others = {"lr": "train/lr", "grad_norm": "train/grad_norm", "speed": "train/tokens_per_sec"}
    for column, (text, name) in zip(st.columns(len(others)), others.items(), strict=True):
        column.vega_lite_chart(spec=chart(t, t[text], {t[text]: curve(metrics, name)}), height=200, key=text)
    show_samples(t, samples)


def show_samples(t: dict[str, str], samples: list[dict[str, Any]]) -> None:
    """Shows what the model replied at a step beside what was really said."""
    import streamlit as st

    st.subheader(t["samples"])
    if not samples:
        st.info(t["no_samples"])
        return
    steps = sorted({row["step"] for row in samples}, reverse=True)
    newest = t["newest"].format(step=steps[0])
    step = st.selectbox(
        t["sample_step"], [NEWEST, *steps], key="step", format_func=lambda step: newest if step == NEWEST else str(step)
    )
    for row in samples:
        if row["step"] == (steps[0] if step == NEWEST else step):
            with st.container(border=True):
                for column, name in zip(st.columns(3), ("prompt", "reply", "real"), strict=True):
                    column.caption(t[name])
                    column.text(row.get(name, ""))


# ---------------------------------------------------------------------------------------------------------------------
# Real or written


class Round(NamedTuple):
    """Two replies to tell apart.

    Attributes:
        contender: The model that wrote one of them.
        id: Of the comment.
        number: Which of the model's replies to it.
        title: Of the video; for conversations of other kinds all that was said.
        desc: The video's description; "" if there is none.
        parent: The comment to answer; "" if there is none.
        real: What a person wrote.
        written: What the model wrote.
    """

    contender: str
    id: str
    number: int
    title: str
    desc: str
    parent: str
    real: str
    written: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What is not shown twice."""
        return self.contender, self.id, self.number


class Score(NamedTuple):
    """How often a model was told from people; `low` and `high` hold the true share with 95 %."""

    contender: str
    right: int
    count: int
    low: float
    high: float


def evaluations() -> list[Path]:
    """The folders of all evaluations below eval/, the newest first."""
    found = from_root("eval").glob("*/replies.jsonl")
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def rounds_of(rows: Iterable[dict[str, Any]]) -> dict[str, list[Round]]:
    """Finds what can be played.

    Args:
        rows: Of replies.jsonl.

    Returns:
        Model -> its replies, without those that tell by themselves whose they are (cut off, or empty), or that nobody
        can tell from the real one, as they are the same.
    """
    rounds: dict[str, list[Round]] = {}
    for row in rows:
        real, cut = showable(row["real"].strip()), row.get("cut") or []
        try:
            about = comment_parts([*row["messages"], {"role": "assistant", "content": real}])
            texts = [showable(text.strip()) for text in row["replies"]]
            marked = [*zip_longest(texts, cut[: len(texts)])]
        except (AttributeError, LookupError, TypeError):
            continue  # It is none of this project's.
        for number, (text, is_cut) in enumerate(marked):
            if real and text and text != real and not is_cut:
                contender = showable(row["contender"])
                rounds.setdefault(contender, []).append(Round(contender, row["id"], number, *about, real, text))
    return rounds


def draw_round(rounds: dict[str, list[Round]], played: Iterable[Round], random: Random) -> Round:
    """Draws the next round: a model evenly, one of its comments, and one of its replies to that.

    None comes again before all have come. Comments whose real reply has not been shown yet, beside whichever model's,
    come first, as there is nothing to guess in the others.

    Args:
        rounds: From `rounds_of`; at least one.
        played: All rounds of this visitor so far.
        random: Where chance comes from.
    """
    played = [*played]
    times, seen = Counter(each.key for each in played), Counter(each.id for each in played)
    every = [each for group in rounds.values() for each in group]
    ranks = {each.key: (times[each.key], seen[each.id]) for each in every}
    least = min(ranks.values())
    pool: dict[str, dict[str, list[Round]]] = {}
    for each in every:
        if ranks[each.key] == least:
            pool.setdefault(each.contender, {}).setdefault(each.id, []).append(each)
    comments = pool[random.choice([*pool])]
    return random.choice(comments[random.choice([*comments])])


def first_guesses(guesses: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out guesses on comments whose real reply a visitor had been told before."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for guess in guesses:
        first.setdefault((guess["session"], guess["id"]), guess)
    return [*first.values()]


def scores(guesses: Iterable[dict[str, Any]]) -> list[Score]:
    """Counts right guesses, for each model; the one that is hardest to tell from people comes first."""
    from scipy.stats import binomtest

    total, right = Counter(), Counter()
    for guess in guesses:
        total[guess["contender"]] += 1
        right[guess["contender"]] += guess["right"]
    found = []
    for contender, count in total.items():
        interval = binomtest(right[contender], count).proportion_ci(method="wilson")
        found.append(Score(contender, right[contender], count, float(interval.low), float(interval.high)))
    return sorted(found, key=lambda score: (score.right / score.count, score.contender))


def streak(guesses: list[dict[str, Any]]) -> int:
    """How many of the last guesses are right, one after another."""
    return len([*takewhile(lambda guess: guess["right"], reversed(guesses))])


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends a line in one piece, so that those of several visitors do not mix.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps(row).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) < len(line):
            raise OSError("the disk is full")
    finally:
        os.close(file)


def read_rounds(path: Path, stamp: tuple[int, int]) -> dict[str, list[Round]]:
    """Reads what models wrote; Streamlit keeps it until the file's `stamp` changes."""
    fields = {"contender": str, "id": str, "video_id": str, "messages": list, "real": str, "replies": list}
    return rounds_of(read_lines(path, fields))


def read_guesses(path: Path, stamp: tuple[int, int]) -> list[dict[str, Any]]:
    """Reads what visitors guessed, as `read_rounds` does."""
    return read_lines(path, {"session": str, "contender": str, "id": str, "right": bool})


def new_game(seed: str) -> dict[str, Any]:
    """What a visitor's page remembers of an evaluation.

    Returns:
        "round", the one on the page, with "order", the sides' ("real", "written"), "since", when it came, and "right",
        how it was guessed, None before; "turn", its number; "chosen", the models that it was drawn from; "seen_before",
        whether the real reply is known by now; "played" and "guesses" so far; "unwritten", whether the last guess could
        not be stored.
    """
    return {
        "random": Random(seed), "round": None, "order": [], "since": 0.0, "right": None, "turn": 0, "chosen": None,
        "played": [], "guesses": [], "unwritten": False,
    }  # fmt: skip


def next_round(game: dict[str, Any], rounds: dict[str, list[Round]]) -> None:
    """Puts another round on the page."""
    drawn = draw_round(rounds, game["played"], game["random"])
    order = game["random"].sample(["real", "written"], 2)
    game |= {"round": drawn, "order": order, "since": time.monotonic(), "right": None, "chosen": {*rounds}}
    seen = any(each.id == drawn.id for each in game["played"])
    game |= {"turn": game["turn"] + 1, "seen_before": seen, "unwritten": False}


def take_guess(game: dict[str, Any], path: Path, session: str, turn: int, place: int) -> None:
    """Writes a guess down; not a second one on the same round, as when a key is pressed twice.

    Args:
        game: From `new_game`.
        path: Of guesses.jsonl.
        session: Whose guess it is.
        turn: Of the round that was guessed at.
        place: Of the reply that was taken for the real one.
    """
    if turn != game["turn"] or game["right"] is not None:
        return
    asked, seconds = game["round"], round(time.monotonic() - game["since"], 1)
    game["right"] = game["order"][place] == "real"
    guess = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "session": session}
    guess |= {"contender": asked.contender, "id": asked.id, "reply": asked.number}
    guess |= {"right": game["right"], "seconds": seconds}
    game["played"].append(asked)
    game["guesses"].append(guess)
    try:
        append_line(path, guess)
    except OSError as error:
        print(f"{shown(path)}: {error}", file=sys.stderr)
        game["unwritten"] = True


def go_on(game: dict[str, Any], turn: int) -> None:
    """Leaves a round that was guessed at; the next one is drawn with the page."""
    if turn == game["turn"] and game["right"] is not None:
        game["round"] = None


def choose_evaluation(t: dict[str, str], names: list[str]) -> str:
    """The choice of an evaluation; the address carries it, so that it goes with a link."""
    import streamlit as st

    state, asked = st.session_state, st.query_params.get("eval")
    if state.get("evaluation") not in names:
        state["evaluation"] = asked if asked in names else names[0]
    with st.sidebar:
        name = st.selectbox(t["evaluation"], names, key="evaluation", persist_state="session")
    st.query_params["eval"] = name
    return name


def guess_page(t: dict[str, str]) -> None:
    """A game: which of two replies did a person write?"""
    import streamlit as st

    folders = {folder.name: folder for folder in evaluations()}
    head, points = st.columns([3, 2], vertical_alignment="bottom")
    head.title(t["guess"])
    head.write(t["guess_lead"])
    st.html(STYLE)
    if not folders:
        st.info(t["no_evaluations"])
        st.code("python evaluate.py --model output_hf/BiliComments --base model/Qwen/Qwen2.5-0.5B", language="sh")
        return
    name = choose_evaluation(t, [*folders])
    path = folders[name] / "replies.jsonl"
    rounds = st.cache_resource(read_rounds, max_entries=8, show_spinner=False)(path, stamp_of(path))
    if not rounds:
        st.info(t["no_rounds"])
        return
    with st.sidebar:
        chosen = st.multiselect(
            t["contenders"],
            sorted(rounds),
            key=f"contenders of {name}",
            help=t["contenders_help"],
            placeholder=t["all_contenders"],
            persist_state="session",
        )
    rounds = {contender: rounds[contender] for contender in chosen or sorted(rounds)}
    session = st.session_state.setdefault("guesser", secrets.token_hex(8))
    game = st.session_state.setdefault("games", {}).setdefault(name, new_game(f"{session} {name}"))
    # Another choice of models is another round: whether one stays would tell whose it is.
    if game["round"] is None or game["chosen"] != {*rounds}:
        next_round(game, rounds)
    show_points(t, game["guesses"], points)
    guesses_path = folders[name] / "guesses.jsonl"
    show_round(t, game, guesses_path, session)
    show_scores(t, guesses_path, game["guesses"])


def show_points(t: dict[str, str], guesses: list[dict[str, Any]], place: Any) -> None:
    """Shows how the visitor is doing."""
    import streamlit as st

    right, row = sum(guess["right"] for guess in guesses), streak(guesses)
    with place.container(horizontal=True, horizontal_alignment="right", gap="large"):
        st.metric(t["points"], f"{right} / {len(guesses)}", width="content")
        st.metric(t["streak"], f"{row} 🔥" if row >= 3 else row, width="content")


def show_round(t: dict[str, str], game: dict[str, Any], path: Path, session: str) -> None:
    """Shows the two replies, and after the guess whose they are."""
    import streamlit as st

    asked, guessed, turn = game["round"], game["right"] is not None, game["turn"]
    if game["seen_before"]:
        st.caption(t["seen_before"])
    with st.container(border=True):
        with st.container(key="video_title"):
            st.caption(t["video"])
            st.text(asked.title)
        if asked.desc:
            st.container(key="video_desc").text(asked.desc)
        if asked.parent:
            st.caption(t["answered"])
            st.text(asked.parent)
    for place, (column, side) in enumerate(zip(st.columns(2), game["order"], strict=True)):
        with column, st.container(border=True, height="stretch", key=f"reply_{place}"):
            # A line from the beginning, so that nothing moves when it says more.
            with st.container(horizontal=True, vertical_alignment="center", key=f"writer_{place}"):
                st.badge("①②"[place], color="gray")
                if guessed and side == "real":
                    st.badge(t["is_real"], icon=":material/person:", color="green")
                elif guessed:
                    st.badge(t["is_written"], icon=":material/smart_toy:", color="violet")
                    st.text(asked.contender)
            st.text(asked.real if side == "real" else asked.written)
    columns = st.columns(2, vertical_alignment="center")
    if not guessed:
        for place, (text, key) in enumerate((("pick_0", "Left"), ("pick_1", "Right"))):
            columns[place].button(
                t[text],
                key=f"pick {place}",
                shortcut=key,
                width="stretch",
                type="primary",
                on_click=take_guess,
                args=(game, path, session, turn, place),
            )
        return
    with columns[0]:
        if game["right"]:
            st.success(t["guessed_right"], icon=":material/celebration:")
        else:
            st.error(t["guessed_wrong"], icon=":material/smart_toy:")
        if game["unwritten"]:
            st.warning(t["unwritten"])
    columns[1].button(
        t["next"], key="next", shortcut="Enter", width="stretch", type="primary", on_click=go_on, args=(game, turn)
    )


def show_scores(t: dict[str, str], path: Path, own: list[dict[str, Any]]) -> None:
    """Shows how well models are told from people, by all visitors and by this one."""
    import streamlit as st

    everybody = st.cache_resource(read_guesses, max_entries=8, show_spinner=False)(path, stamp_of(path))
    for tab, guesses in zip(st.tabs([t["everybody"], t["me"]]), (everybody, own), strict=True):
        with tab:
            found = scores(first_guesses(guesses))
            if not found:
                st.caption(t["no_guesses"])
                continue
            rows = [
                {
                    t["contender"]: score.contender,
                    t["share"]: 100 * score.right / score.count,
                    t["interval"]: f"{score.low:.0%} – {score.high:.0%}",
                    t["guesses"]: score.count,
                }
                for score in found
            ]
            bar = st.column_config.ProgressColumn(format="%.0f%%", min_value=0, max_value=100)
            st.dataframe(rows, hide_index=True, column_config={t["share"]: bar})
            if any(score.count < FEW_GUESSES for score in found):
                st.caption(t["few_guesses"].format(count=FEW_GUESSES))
    st.caption(t["scores_help"])


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Draws the page, for each visitor and each thing that one does."""
    import streamlit as st

    try:
        args = read_arguments(sys.argv[1:])
    except SystemExit as end:
        print(end.code or "", file=sys.stderr)
        if end.code:
            st.error(" ".join(texts["wrong_arguments"] for texts in TEXTS.values()))
        st.text(end.code or build_parser().format_help())
        return
    # Streamlit runs this anew while the last run, which a button has ended, may still be writing down what has come.
    with st.session_state.setdefault("following", threading.Lock()):
        t = TEXTS[choose_language()]
    pages = {
        "comments": st.Page(partial(comments_page, args, t), title=t["comments"], url_path="comments", default=True),
        "chat": st.Page(partial(chat_page, args, t), title=t["chat"], url_path="chat"),
        "training": st.Page(partial(training_page, t), title=t["training"], url_path="training"),
        "guess": st.Page(partial(guess_page, t), title=t["guess"], url_path="guess"),
        "data": st.Page(partial(data_page, t), title=t["data"], url_path="data"),
    }
    page = st.navigation([*pages.values()])
    layout = "centered" if page.title == t["chat"] else "wide"
    st.set_page_config(page_title=f"llm-train-playground · {page.title}", page_icon="💬", layout=layout)
    page.run()


if __name__ == "__main__":
    if "streamlit" in sys.modules:
        main()
    else:
        read_arguments(sys.argv[1:])
        raise SystemExit(f"This is a page for the browser. Start it with:\n    {START} {shlex.join(sys.argv[1:])}")
