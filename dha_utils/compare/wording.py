"""What notebook 06 says, in Japanese: {English: Japanese}. Its markdown cells carry theirs in their metadata (`ja`)."""

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
    "Requests of {context:,} tokens that fit beside the weights": "重みと合わせてメモリに収まる {context:,} トークンの要求数",
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
    "Answer a copy of real requests, show nobody. Agreement with the source at least {agreement:.0%}; here {measured:.0%}.": (
        "実際の要求の写しに答え、誰にも見せない。ソースとの一致率は {agreement:.0%} 以上（ここでは {measured:.0%}）。"
    ),
    "A small share of users. LM loss at most {limit:.3f} nats a token on text like {text} (here {mean:.3f}); memory a request {share:.0%} of the source's.": (
        "利用者のごく一部。{text} に近い文章での LM 損失は 1 トークンあたり {limit:.3f} nat 以下（ここでは {mean:.3f}）、一要求のメモリはソースの {share:.0%}。"
    ),
    "`python -m dha_utils monitor --baseline {path} --model … --text …` on fresh text: exits with 1 on drift; of an unchanged model in one of {checks:,.0f} checks.": (
        "新しい文章に対して `python -m dha_utils monitor --baseline {path} --model … --text …`。ずれがあれば 1 で終わる。変わっていないモデルでそうなるのは {checks:,.0f} 回の検査に一回。"
    ),
    "The source's weights stay where they are: requests go back to it. Its cache is {times:.1f} times as large, so room for that stays reserved.": (
        "ソースの重みは残しておき、要求をそちらへ戻す。そのキャッシュは {times:.1f} 倍の大きさなので、その分の場所を空けておく。"
    ),
    # what was found
    "Perplexity on {text} rises by {mean:.1%} (95 % interval {low:.1%} to {high:.1%} over {count} documents), on {other} by {elsewhere:.1%}.": (
        "{text} のパープレキシティは {mean:.1%} 上がる（{count} 文書による 95 % 区間 {low:.1%} から {high:.1%}）。{other} では {elsewhere:.1%}。"
    ),
    "Both models expect the same token in {agreement:.0%} of places on {text}, in {elsewhere:.0%} on {other}; {turned:.0%} of {count} answers turned right or wrong.": (
        "両方のモデルが同じトークンを予測する箇所は {text} で {agreement:.0%}、{other} で {elsewhere:.0%}。{count} 個の答えのうち {turned:.0%} で正誤が入れ替わった。"
    ),
    "The cache is {kept:.0%} of the source's; on this machine {fast:.2f} times as many tokens a second, {batch} users with {context:,} tokens each.": (
        "キャッシュはソースの {kept:.0%}。この計算機での毎秒トークン数は {fast:.2f} 倍（{batch} 人の利用者、それぞれ {context:,} トークン）。"
    ),
    "**{verdict}** for {model} ({size:.3g} million weights), `{checkpoint}`: {because}": (
        "**{verdict}**、{model}（重み {size:.3g} 百万個）、`{checkpoint}`：{because}"
    ),
    "Not measured here: quality beyond {length} tokens of context, how instructions are followed, speed on an accelerator.": (
        "ここで測っていないもの：{length} トークンを超える文脈での品質、指示への従い方、アクセラレータでの速度。"
    ),
    "Without a gate on its drop, since the source has at most {limit:.0%} right: {tasks}.": "ソースの正答率が {limit:.0%} 以下のため、低下を判定に使わない課題：{tasks}。",
}
