"""Sphinx hooks of the API page: equations of docstrings become mathematics, and names become links."""

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx
else:
    Sphinx = Any

MODULES = tuple(f"fastkd.{name}" for name in ("functional", "losses", "capture", "distributed", "compat", "testing"))
SUMMARY = re.compile(r"<!-- names of ([\w.]+) -->")

# The first equation of a docstring as its source has it, and as LaTeX. help() shows the first, the site the second.
EQUATIONS = {
    "L = 1/(G n²) Σ_g || f(S_g S_gᵀ) - f(T_g T_gᵀ) ||²,  rows of S_g and T_g of unit length": (
        r"L = \frac{1}{G n^2} \sum_g \lVert f(S_g S_g^\top) - f(T_g T_g^\top) \rVert^2,"
        r"\quad \text{rows of } S_g \text{ and } T_g \text{ of unit length}"
    ),
    "L = intra L_intra + inter L_inter + random L_random,  the mean over matched layers": (
        r"L = \lambda_{\text{intra}} L_{\text{intra}} + \lambda_{\text{inter}} L_{\text{inter}}"
        r" + \lambda_{\text{random}} L_{\text{random}}, \quad \text{the mean over matched layers}"
    ),
    "L = 1/L Σ_l ( intra L_intra + inter L_inter + random L_random ),  the weights of the official code": (
        r"\frac{1}{\lvert \text{layers} \rvert} \sum_l \bigl( \lambda_{\text{intra}} L_{\text{intra}}"
        r" + \lambda_{\text{inter}} L_{\text{inter}} + \lambda_{\text{random}} L_{\text{random}} \bigr)"
    ),
    "z = (q kᵀ scale + bias) / T,  p = softmax(z),  a row's loss L_i being": (
        r"z = \frac{\text{scale} \cdot q k^\top + \text{bias}}{T}, \quad p = \operatorname{softmax}(z),"
        r" \quad \text{and a row's loss is}"
    ),
    '"kl"          Σ_j p_t (log p_t - log p_s)             "ce"         -Σ_j p_t log p_s\n'
    '"reverse_kl"  Σ_j p_s (log p_s - log p_t)             "mse"        1/N_k Σ_j (p_s - p_t)²\n'
    '"js"          ½ KL(p_s ‖ m) + ½ KL(p_t ‖ m), m = (p_s + p_t)/2\n'
    '                                                      "score_mse"  1/N_k Σ_j (z_s - z_t)²': (
        r"\begin{array}{ll}"
        r"\texttt{kl} & \sum_j p_t (\log p_t - \log p_s) \\"
        r"\texttt{reverse_kl} & \sum_j p_s (\log p_s - \log p_t) \\"
        r"\texttt{js} & \tfrac12 \operatorname{KL}(p_s \,\Vert\, m) + \tfrac12 \operatorname{KL}(p_t \,\Vert\, m),"
        r" \quad m = (p_s + p_t) / 2 \\"
        r"\texttt{ce} & -\sum_j p_t \log p_s \\"
        r"\texttt{mse} & \frac{1}{N_k} \sum_j (p_s - p_t)^2 \\"
        r"\texttt{score_mse} & \frac{1}{N_k} \sum_j (z_s - z_t)^2"
        r"\end{array}"
    ),
    "L = Σ_r w_r mean KL( softmax(a_t b_tᵀ (D_t/A)^-1/2) ‖ softmax(a_s b_sᵀ (D_s/A)^-1/2) ),  (a, b) = r": (
        r"L = \sum_{r = (a, b)} w_r \operatorname{mean} \operatorname{KL}\left("
        r"\operatorname{softmax} \frac{a_t b_t^\top}{\sqrt{D_t / A}} \,\middle\Vert\,"
        r"\operatorname{softmax} \frac{a_s b_s^\top}{\sqrt{D_s / A}} \right)"
    ),
    "mean_c = 1/M Σ x,  var_c = 1/M Σ (x - mean_c)²,  dx = dmean_c/M + 2 dvar_c (x - mean_c)/M": (
        r"\mu_c = \frac{1}{M} \sum x, \quad v_c = \frac{1}{M} \sum (x - \mu_c)^2,"
        r"\quad \mathrm{d}x = \frac{\mathrm{d}\mu_c + 2\, \mathrm{d}v_c (x - \mu_c)}{M}"
    ),
    '"l2"     Σ_l w_l ( ||V_l - var_l|| + ||M_l - mean_l|| )             DeepInversion, arXiv:1912.08795\n'
    '"mse"    1/L Σ_l w_l ( mean_c (V_l - var_l)² + mean_c (M_l - mean_l)² )       GDFQ, arXiv:2003.03603\n'
    '"image"  1/B Σ_l w_l Σ_bc ( (M_l - mean_bl)² + (√(V_l + 1e-6) - √(var_bl + 1e-6))² )  ZeroQ, arXiv:2001.00281': (
        r"\begin{array}{lll}"
        r"\texttt{l2} & \sum_l w_l \bigl( \lVert V_l - v_l \rVert + \lVert M_l - \mu_l \rVert \bigr)"
        r" & \text{DeepInversion, arXiv:1912.08795} \\"
        r"\texttt{mse} & \frac{1}{\lvert \text{layers} \rvert} \sum_l w_l \bigl( \operatorname{mean}_c (V_l - v_l)^2"
        r" + \operatorname{mean}_c (M_l - \mu_l)^2 \bigr) & \text{GDFQ, arXiv:2003.03603} \\"
        r"\texttt{image} & \frac{1}{B} \sum_l w_l \sum_{b, c} \bigl( (M_l - \mu_{bl})^2"
        r" + (\sqrt{V_l + 10^{-6}} - \sqrt{v_{bl} + 10^{-6}})^2 \bigr) & \text{ZeroQ, arXiv:2001.00281}"
        r"\end{array}"
    ),
    "y = weight (x - running_mean) / √(running_var + eps) + bias,   (mean, var) = batch_moments(x)\n"
    "dx = dy weight / √(running_var + eps) + dmean/M + 2 dvar (x - mean)/M": (
        r"\begin{aligned}"
        r"y &= \text{weight} \, \frac{x - \text{running mean}}{\sqrt{\text{running var} + \varepsilon}}"
        r" + \text{bias} \\"
        r"\mathrm{d}x &= \frac{\text{weight}}{\sqrt{\text{running var} + \varepsilon}} \, \mathrm{d}y"
        r" + \frac{\mathrm{d}\mu + 2\, \mathrm{d}v (x - \mu)}{M}"
        r"\end{aligned}"
    ),
    "L = 1/|A| Σ_{a∈A} ( -min(‖z_a - z_e‖, m₁) + max(0, ‖z_a - sg z_h‖ - sg ‖z_a - z_n‖ + m₂) )": (
        r"L = \frac{1}{\lvert A \rvert} \sum_{a \in A} \Bigl( -\min(\lVert z_a - z_e \rVert, m_1)"
        r" + \max\bigl(0, \lVert z_a - \operatorname{sg} z_h \rVert - \operatorname{sg} \lVert z_a - z_n \rVert + m_2"
        r"\bigr) \Bigr)"
    ),
    "L = T²/B Σ_b KL( softmax(teacher/T) ‖ softmax(student/T) )": (
        r"L = \frac{T^2}{B} \sum_b \operatorname{KL}\bigl( \operatorname{softmax}(\text{teacher} / T) \,\Vert\,"
        r"\operatorname{softmax}(\text{student} / T) \bigr)"
    ),
    "L = T²/B Σ_b ( α KL( (q_y, 1 - q_y) ‖ (p_y, 1 - p_y) ) + β KL( q' ‖ p' ) )": (
        r"L = \frac{T^2}{B} \sum_b \bigl( \alpha \operatorname{KL}\bigl( (q_y, 1 - q_y) \,\Vert\, (p_y, 1 - p_y) \bigr)"
        r" + \beta \operatorname{KL}( q' \,\Vert\, p' ) \bigr)"
    ),
    "L = -1/B Σ_b ( q_y log p_y + γ T² Σ_{i≠y} q'_i log p'_i )": (
        r"L = -\frac{1}{B} \sum_b \Bigl( q_y \log p_y + \gamma T^2 \sum_{i \ne y} q'_i \log p'_i \Bigr)"
    ),
    "L = 1 - clamp(J, 0, 1),  J = 1/2B Σ_b ( KL(M ‖ P) + KL(M ‖ Q) ),  M = (P + Q)/2": (
        r"L = 1 - \operatorname{clamp}(J, 0, 1), \quad J = \frac{1}{2B} \sum_b \bigl( \operatorname{KL}(M \,\Vert\, P)"
        r" + \operatorname{KL}(M \,\Vert\, Q) \bigr), \quad M = \frac{P + Q}{2}"
    ),
    "p = 1:  Σ_k mean |d_k|,    p = 2:  Σ_k ‖d_k‖  (one unsquared norm per direction over the whole batch)": (
        r"p = 1\colon\ \sum_k \operatorname{mean} \lvert d_k \rvert, \qquad p = 2\colon\ \sum_k \lVert d_k \rVert"
        r"\ \text{ (one unsquared norm per direction over the whole batch)}"
    ),
    "L = tv_l1 TV₁ + tv_l2 TV₂ + l2 mean_b ‖x_b‖    (l2 ‖x‖ over the whole batch unless l2_per_image)": (
        r"L = \texttt{tv_l1} \, \mathrm{TV}_1 + \texttt{tv_l2} \, \mathrm{TV}_2"
        r" + \texttt{l2} \operatorname{mean}_b \lVert x_b \rVert \quad"
        r"(\texttt{l2} \, \lVert x \rVert \text{ over the whole batch unless } \texttt{l2_per_image})"
    ),
    "L = Σ_l mean( (A_l(s_l) - t_l)² ),  A_l: LayerNorm, GELU, Linear (Ds -> C), bilinear resize of the token grid": (
        r"L = \sum_l \operatorname{mean} \bigl( A_l(s_l) - t_l \bigr)^2, \quad"
        r"A_l\colon \text{LayerNorm, GELU, Linear } (D_s \to C) \text{, bilinear resize of the token grid}"
    ),
    "L = α/B Σ_l ‖W_l s_l - t_l‖²  +  β/(λB) ‖m ⊙ (G(m ? token : W s) - t)‖²": (
        r"L = \frac{\alpha}{B} \sum_l \lVert W_l s_l - t_l \rVert^2 + \frac{\beta}{\lambda B}"
        r" \bigl\lVert m \odot \bigl( G(m \mathbin{?} \text{token} : W s) - t \bigr) \bigr\rVert^2"
    ),
    "L = -α T²/B Σ_b Σ_i q_i log p_i,  p and q the softmax of student/T and teacher/T": (
        r"L = -\frac{\alpha T^2}{B} \sum_b \sum_i q_i \log p_i, \quad p = \operatorname{softmax}(\text{student} / T),"
        r"\ q = \operatorname{softmax}(\text{teacher} / T)"
    ),
    "r_feature = ‖running_var - var‖ + ‖running_mean - mean‖,  moments of what enters the layer, var biased": (
        r"r = \lVert \text{running var} - v \rVert + \lVert \text{running mean} - \mu \rVert,"
        r"\quad \text{moments of what enters the layer, } v \text{ biased}"
    ),
    "L = (1 - α) criterion(outputs, labels) + α D\n"
    "soft: D = T²/(B C) Σ_b KL( softmax(teacher/T) ‖ softmax(outputs_kd/T) )\n"
    "hard: D = cross-entropy of outputs_kd and the teacher's largest class": (
        r"\begin{aligned}"
        r"L &= (1 - \alpha) \operatorname{criterion}(\text{outputs}, \text{labels}) + \alpha D \\"
        r"\text{soft: } D &= \frac{T^2}{B C} \sum_b \operatorname{KL}\bigl( \operatorname{softmax}(\text{teacher} / T)"
        r" \,\Vert\, \operatorname{softmax}(\texttt{outputs_kd} / T) \bigr) \\"
        r"\text{hard: } D &= \text{cross-entropy of } \texttt{outputs_kd} \text{ and the teacher's largest class}"
        r"\end{aligned}"
    ),
    "L = -1/B Σ_b Σ_c q_c log softmax(outputs)_c,  q the K stored values, the rest of 1 spread over C - K classes": (
        r"L = -\frac{1}{B} \sum_b \sum_c q_c \log \operatorname{softmax}(\text{outputs})_c, \quad q\colon"
        r" \text{the } K \text{ stored values, the rest of 1 spread over } C - K \text{ classes}"
    ),
    "L = Σ_(m,n) w_mn 1/B Σ_b 1/(A_r n_b) Σ_heads,queries KL( softmax(t_m t_nᵀ d'^-1/2) ‖ softmax(s_m s_nᵀ d^-1/2) )": (
        r"L = \sum_{(m, n)} \frac{w_{mn}}{B} \sum_b \frac{1}{A_r n_b} \sum_{\text{heads, queries}}"
        r" \operatorname{KL}\left( \operatorname{softmax} \frac{t_m t_n^\top}{\sqrt{d'}} \,\middle\Vert\,"
        r"\operatorname{softmax} \frac{s_m s_n^\top}{\sqrt{d}} \right)"
    ),
    "mean over images, heads and queries of KL( softmax(a_t b_tᵀ d'^-1/2) ‖ softmax(a_s b_sᵀ d^-1/2) )": (
        r"\operatorname{mean}_{\text{images, heads, queries}} \operatorname{KL}\left("
        r"\operatorname{softmax} \frac{a_t b_t^\top}{\sqrt{d'}} \,\middle\Vert\,"
        r"\operatorname{softmax} \frac{a_s b_s^\top}{\sqrt{d}} \right)"
    ),
    "row-max error <= 2 (eager + eps(dtype) + sqrt(reduced) eps(accumulator))      a wrong element\n"
    "relative L2   <= 2 (eager + sqrt(reduced) eps(accumulator))                   a small bias": (
        r"\begin{aligned}"
        r"\text{largest error of a row} &\le 2 (e_{\text{eager}} + \varepsilon_{\text{dtype}}"
        r" + \sqrt{\text{reduced}} \, \varepsilon_{\text{acc}}) && \text{a wrong element} \\"
        r"\text{relative } L_2 \text{ error} &\le 2 (e_{\text{eager}}"
        r" + \sqrt{\text{reduced}} \, \varepsilon_{\text{acc}}) && \text{a small bias}"
        r"\end{aligned}"
    ),
}


@functools.cache
def public() -> dict[str, str]:
    """Return the full name of every public function and class by its short one, the library's own names first."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for short in names(module):
            found.setdefault(short, f"{name}.{short}")
    # A word such as `tokens` is a function only where a module's name stands before it.
    return {short: full for short, full in found.items() if "_" in short or short.endswith(("Loss", "Hook"))}


def names(module: Any) -> list[str]:
    """Return the public names of a module, in the order of its source."""
    listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {n: getattr(module, n) for n in listed}
    return [
        n
        for n, of in found.items()
        if (inspect.isroutine(of) or inspect.isclass(of)) and getattr(of, "__module__", "").startswith("fastkd")
    ]


def linked(line: str, own: str = "") -> str:
    """Return a line of a docstring as reStructuredText: names of other functions are links, code is literal."""
    known = {short: full for short, full in public().items() if full != own}

    def code(text: str) -> str:
        return f":py:obj:`{text} <{known[text]}>`" if text in known else f"``{text}``"

    def prose(text: str) -> str:
        text = re.sub(r"([*|`])", r"\\\1", text)
        return re.sub(r"(?<=[ (])\w+(?=[ .,;:)]|$)", lambda m: code(m[0]) if m[0] in known else m[0], text)

    parts = re.split(r"(?<![\w`])`([^`]+)`(?![\w`])", line)
    return "".join(code(part) if i % 2 else prose(part) for i, part in enumerate(parts))


def blocks(lines: list[str]) -> list[tuple[int, int]]:
    """Return (first, last + 1) of every indented block that follows a blank line before the first field."""
    found, i = [], 0
    while i < len(lines) and not lines[i].startswith(":"):
        if lines[i].startswith("    ") and i and not lines[i - 1].strip():
            j = i
            while j < len(lines) and lines[j].strip():
                j += 1
            found.append((i, j))
            i = j
        i += 1
    return found


def render(app: "Sphinx", what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Typeset the equations of a docstring, keep its other indented blocks, and link the names in its prose."""
    if what == "module":  # the page's headings say what a module holds
        lines.clear()
    kept: list[str] = []
    done = 0
    for first, last in blocks(lines):
        kept += [linked(line, name) for line in lines[done:first]]
        text = "\n".join(line[4:] for line in lines[first:last])
        latex = EQUATIONS.get(text)
        kept += [".. math::", "", f"    {latex}"] if latex else ["::", "", *lines[first:last]]
        done = last
    kept += [line if line.lstrip().startswith(":") else linked(line, name) for line in lines[done:]]
    lines[:] = kept


def insert(app: "Sphinx", page: str, source: list[str]) -> None:
    """Replace the placeholders of api.md by tables of names, and link the functions that a page's prose names."""
    if Path(app.env.doc2path(page)).suffix != ".md":
        return
    source[0] = SUMMARY.sub(_summary, source[0])
    known = public()
    parts = re.split(
        r"(^```.*?^```$|^#.*?$|^:::.*?^:::$|\[[^\]]*\]\([^)]*\))", source[0], flags=re.MULTILINE | re.DOTALL
    )
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(
            r"`(?:fastkd\.)?(?:losses\.|compat\.)?(\w+)`",
            lambda m: f"{{py:obj}}`{m[0][1:-1]} <{known[m[1]]}>`" if m[1] in known else m[0],
            parts[i],
        )
    source[0] = "".join(parts)


def _summary(found: re.Match[str]) -> str:
    module = importlib.import_module(found[1])
    listed = "\n".join(f"    ~{found[1]}.{name}" for name in names(module))
    return f"```{{eval-rst}}\n.. autosummary::\n    :nosignatures:\n\n{listed}\n```"
