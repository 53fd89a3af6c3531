"""What notebook 06 says, in Japanese: {English: Japanese}. Its markdown cells carry theirs in their metadata (`ja`)."""

import pandas as pd

JAPANESE = {
    # verdicts
    "GO": "GO（変換してよい）",
    "NO-GO": "NO-GO（変換しない）",
    "CANNOT TELL": "CANNOT TELL（判定できない）",
    "all {count} gates hold.": "{count} 個のゲートすべてを満たしています。",
    "stopped by: {names}.": "満たさなかったゲート：{names}。",
    "the interval reaches across the limit of: {names}. As many as would tell, if what was measured is right: {more}.": (
        "区間が限度をまたぐゲート：{names}。測定値が正しければ判定に必要な数：{more}。"
    ),
    # charts
    "source": "ソース",
    "model": "モデル",
    "converted model": "変換後のモデル",
    "converted model, layer {layer}": "変換後のモデル、第 {layer} 層",
    "Query heads (middle), and the key heads (above) and value heads (below) that they read": (
        "クエリヘッド（中央）と、それが読むキーヘッド（上）およびバリューヘッド（下）"
    ),
    "perplexity, times the source's": "パープレキシティ（ソース比）",
    "What the conversion costs, document by document (diamonds: mean and 95 % interval)": (
        "変換で失うもの、文書ごと（菱形：平均と 95 % 区間）"
    ),
    "share of right answers (bars: standard error)": "正答率（線：標準誤差）",
    "The same questions, before and after": "同じ問題、変換の前と後",
    "{kept} of {all} heads in the cache": "{all} ヘッド中 {kept} をキャッシュ",
    "keys": "キー",
    "queries": "クエリ",
    "values": "バリュー",
    "What this conversion took is not on record.": "この変換にかかったものの記録はありません。",
    "percentage points": "パーセントポイント",
    "change of its share (percentage points)": "割合の変化（ポイント）",
    "query head": "クエリヘッド",
    "layer": "層",
    "Change of each head's share in what its layer's attention adds": "各ヘッドの寄与の割合の変化（層ごと）",
    "requests": "要求数",
    "Requests of {context:,} tokens that fit beside the weights (computed; only {name} was converted)": (
        "重みと合わせてメモリに収まる {context:,} トークンの要求数（計算値。変換したのは {name} のみ）"
    ),
    "memory (GB)": "メモリ（GB）",
    "bandwidth (GB/s)": "帯域（GB/s）",
    "price an hour": "一時間の価格",
    "assumed": "仮定",
    "{batch} users × {context:,} tokens": "利用者 {batch} 人 × {context:,} トークン",
    "how much of its limit is used up (right of 1: it fails)": "限度をどれだけ使っているか（1 より右は不合格）",
    "Gates: measured, with 95 % intervals": "ゲート：測定値と 95 % 区間",
    # tables
    "key heads": "キーヘッド",
    "value heads": "バリューヘッド",
    "documents": "文書数",
    "times the source's": "ソース比",
    "from": "下限",
    "to": "上限",
    "perplexity": "パープレキシティ",
    "task": "課題",
    "items": "件数",
    "documents or questions": "文書または問題の数",
    "as many as would tell": "判定に必要な数",
    "low": "下限（95 %）",
    "high": "上限（95 %）",
    "change, from": "変化、下限",
    "change, to": "変化、上限",
    "share of the source's score": "ソースの正答率に対する割合",
    "lost": "失った正解",
    "won": "得た正解",
    "flips": "正誤が入れ替わった答え",
    "McNemar's p": "マクネマー検定の p 値",
    "KL (nats)": "KL（nat）",
    "agreement": "一致率",
    "calibration error, source": "較正誤差、ソース",
    "calibration error, converted model": "較正誤差、変換後のモデル",
    "text before": "直前の文",
    "true token": "正しいトークン",
    "source expects": "ソースの予測",
    "model expects": "モデルの予測",
    "sampled": "サンプリング",
    "always the likeliest token": "常に最も確からしいトークン",
    "prompt": "書き出し",
    "version": "版",
    "accelerator": "アクセラレータ",
    "KV cache of a request (GB), by context": "一要求の KV キャッシュ（GB）、文脈長ごと",
    "tokens a second, at most": "毎秒トークン数（上限）",
    "price of a million tokens, at least": "百万トークンの価格（下限）",
    "tokens a second, source": "毎秒トークン数、ソース",
    "tokens a second, converted model": "毎秒トークン数、変換後のモデル",
    "times as fast, measured": "速度比、測定値",
    "times as fast, predicted from bytes": "速度比、バイト数からの予測",
    "what the conversion took": "変換にかかったもの",
    "seconds": "秒",
    "peak (GiB)": "それまでの最大メモリ（GiB）",
    "tokens": "トークン数",
    "gate": "ゲート",
    "measured": "測定値",
    "limit": "限度",
    "must be": "条件",
    "verdict": "判定",
    "the cache is the share of heads that the plan keeps": "キャッシュは、計画が残すヘッドの割合に等しい",
    "both models find the next passage more often than by chance": "どちらのモデルも、続きの断片を偶然より多く当てる",
    "the KL is larger where the two expect different tokens": "両者の予測が異なる箇所で KL が大きい",
    "on this run": "この実行で",
    "monitored": "監視する値",
    "at most": "以下",
    "at least": "以上",
    "loss": "損失",
    "wrong": "誤り",
    "overconfidence": "過信",
    "LM loss (nats a token)": "LM 損失（1 トークンあたりの nat）",
    "share of tokens whose most likely one is not the true one": "最も確からしいトークンが正しくない割合",
    "mean probability of the most likely token, less the share that is right": "最も確からしいトークンの平均確率から、正しい割合を引いたもの",
    "mean": "平均",
    "what": "内容",
    # gates
    "perplexity on {name}, increase": "{name} のパープレキシティの増加",
    "DHA, {kept:.0%}": "DHA、{kept:.0%}",
    "agreement on {name}": "{name} の一致率",
    "{task}, drop": "{task} の低下",
    "{task}, flips": "{task} で入れ替わった答え",
    "saving of cache": "キャッシュの節約",
    # roll-out
    "offline": "オフライン",
    "shadow traffic": "シャドートラフィック",
    "canary": "カナリア",
    "full": "全面導入",
    "way back": "引き返す道",
    "This report: {verdict}; {name} at {kept:.0%} of its cache.": "この報告：{verdict}。{name}、キャッシュは {kept:.0%}。",
    "`python -m dha_utils monitor --baseline {path} --model … --text …` on fresh text: exits with 1 on drift; of an unchanged model in one of {checks:,.0f} checks.": (
        "新しい文章に対して `python -m dha_utils monitor --baseline {path} --model … --text …`。ずれがあれば 1 で終わる。変わっていないモデルでそうなるのは {checks:,.0f} 回の検査に一回。"
    ),
    "Answer a copy of real requests, show nobody. Agreement with the source, both reading the same text (`dha_utils.compare.drift.token_drift`), at least {agreement:.0%}; here {measured}.": (
        "実際の要求の写しに答え、誰にも見せない。同じ文章を両方に読ませたときのソースとの一致率（`dha_utils.compare.drift.token_drift`）は {agreement:.0%} 以上（ここでは {measured}）。"
    ),
    "A small share of users. LM loss at most {limit:.3f} nats a token on text like {text} (here {mean:.3f}): an alarm for drift and no limit of quality, since it allows {more:.0%} more perplexity than was accepted. Memory a request {share:.0%} of the source's.": (
        "利用者のごく一部。{text} に近い文章での LM 損失は 1 トークンあたり {limit:.3f} nat 以下（ここでは {mean:.3f}）。これはずれの警報であって品質の限度ではない（受け入れた値よりパープレキシティが {more:.0%} 高くても鳴らない）。一要求のメモリはソースの {share:.0%}。"
    ),
    "The source's weights stay where they are: requests go back to it. Its cache is {times:.1f} times as large: until this way is given up, the memory saved cannot be given to more requests.": (
        "ソースの重みは残しておき、要求をそちらへ戻す。そのキャッシュは {times:.1f} 倍の大きさなので、この道を閉じるまでは、節約したメモリを他の要求に使えない。"
    ),
    # what was found
    "Perplexity on {text} rises from {before:.1f} by {mean:.1%} (95 % interval {low:.1%} to {high:.1%}), on {other} from {elsewhere:.1f} by {more:.1%}.": (
        "{text} のパープレキシティは {before:.1f} から {mean:.1%} 上がる（95 % 区間 {low:.1%} から {high:.1%}）。{other} では {elsewhere:.1f} から {more:.1%}。"
    ),
    "The cache is {kept:.0%} of the source's; on this machine {fast:.2f} times as many tokens a second ({predicted:.2f} predicted from bytes), {batch} users with {context:,} tokens each.": (
        "キャッシュはソースの {kept:.0%}。この計算機での毎秒トークン数は {fast:.2f} 倍（バイト数からの予測は {predicted:.2f} 倍。{batch} 人の利用者、それぞれ {context:,} トークン）。"
    ),
    "Always taking the likeliest token, it repeats {after:.0%} of what it writes, the source {before:.0%} ({prompts} prompts; no gate).": (
        "常に最も確からしいトークンを選ぶと、書いたものの {after:.0%} が繰り返しになる。ソースでは {before:.0%}（書き出し {prompts} 個、ゲートなし）。"
    ),
    "Not judged, since the source has at most {largest_task_drop:.0%} right: {tasks}.": (
        "ソースの正答率が {largest_task_drop:.0%} 以下のため、判定に使わない課題：{tasks}。"
    ),
    "The limits are parameters, examples unless you set them: perplexity at most {largest_increase:.0%} more, agreement at least {smallest_agreement:.0%}, right answers at most {largest_task_drop:.0%} fewer, answers turned at most {most_flips:.0%}, cache at least {smallest_saving:.0%} smaller.": (
        "限度はパラメータであり、設定しない限り例にすぎない：パープレキシティの増加 {largest_increase:.0%} 以下、一致率 {smallest_agreement:.0%} 以上、正答率の低下 {largest_task_drop:.0%} 以下、入れ替わった答え {most_flips:.0%} 以下、キャッシュの節約 {smallest_saving:.0%} 以上。"
    ),
    "Not measured here: quality beyond {length} tokens of context, how well a passage that was read before is copied (where fewer heads lose most), how instructions are followed, speed on an accelerator. One conversion, one seed: the intervals are over texts and questions only. Other sizes, and other ways to the same size: notebook 5.": (
        "ここで測っていないもの：{length} トークンを超える文脈での品質、既に読んだ箇所の繰り返しの正確さ（ヘッドを減らすと最も失われやすい）、指示への従い方、アクセラレータでの速度。変換は一回、シードも一つであり、区間は文章と問題のばらつきだけを表す。他の大きさ、同じ大きさへの他の方法はノートブック 5 にある。"
    ),
    "Both models expect the same token in {agreement:.0%} of places on {text}, in {elsewhere:.0%} on {other}; {turned:.0%} of {count} answers turned right or wrong.": (
        "両方のモデルが同じトークンを予測する箇所は {text} で {agreement:.0%}、{other} で {elsewhere:.0%}。{count} 個の答えのうち {turned:.0%} で正誤が入れ替わった。"
    ),
    "**{verdict}** for {model} ({size:.3g} million weights), `{checkpoint}`: {because}": (
        "**{verdict}**、{model}（重み {size:.3g} 百万個）、`{checkpoint}`：{because}"
    ),
}


def wording(language="en"):
    """`say(text, **figures)`: the English `text` in `language` (`en` or `ja`), figures put in; a table gets its names.

    For Japanese, charts get a font that has its letters. Raises KeyError for a sentence that has no translation; names of
    tables that have none, such as tasks and numbers, stay as they are.
    """
    translations = JAPANESE if language == "ja" else {}
    if translations:
        import matplotlib_fontja

        matplotlib_fontja.japanize()

    def name(text):
        return translations.get(text, text)

    def say(text, /, **figures):
        if isinstance(text, pd.DataFrame):
            table = text.map(lambda cell: name(cell) if isinstance(cell, str) else cell).rename(index=name, columns=name)
            return table.rename_axis(index=list(map(name, text.index.names)), columns=list(map(name, text.columns.names)))
        return (translations[text] if translations else text).format(**figures)

    return say
