"""The mathematics of a row of scores: maxima, sums, divergences and their gradients."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NEVER: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def _log1p(x):
    """log(1 + x), right to rounding near 0 as well."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _base(m):
    """Return the offset subtracted from a row's scores: its maximum, or 0 without keys."""
    return tl.where(m == NEVER, 0.0, m)


@triton.jit
def _advance(m, l, z):  # noqa: E741 (the equation's letter)
    """Update a row's maximum and sum by a tile. Return them with y = z - m, e^y, the factor that rescales earlier e^y
    to the new maximum, and the change of the maximum. A row without keys has y = -inf, l = 0."""
    m_new = tl.maximum(m, tl.max(z, 1))
    base = _base(m_new)
    moved = tl.where(l > 0, base - m, 0.0)
    alpha = tl.exp2(m - base)
    y = z - base[:, None]
    e = tl.exp2(y)
    return m_new, l * alpha + tl.sum(e, 1), y, e, alpha, moved


@triton.jit
def _advance_cross(u, l_a, y_a, e_a, alpha_a, moved_a, y_b, moved_b):
    """Σ e_a (y_a - y_b) with a tile more, l_a of before it. A key that a gives no weight adds nothing."""
    u = tl.where(alpha_a == 0, 0.0, alpha_a * (u + l_a * (moved_b - moved_a)))
    return u + tl.sum(tl.where(e_a == 0, 0.0, e_a * (y_a - y_b)), 1)


@triton.jit
def _kl(u, x, l_a, l_b):
    """KL(a ‖ b) of a row, x = l_b - l_a; 0 where a has no key."""
    share = x / _or_one(l_a)
    ratio = tl.where(tl.abs(share) < 0.5, _log1p(share), tl.log(_or_one(l_b) / _or_one(l_a)))
    return tl.where(l_a == 0, 0.0, u / _or_one(l_a) * LN_2 + tl.where(l_b == 0, 0.0, ratio))


@triton.jit
def _log_of_half(p, d, inv_sum):
    """log(2 p / (p + r)) = log(1 + h), h = (p - r) / (p + r), d = p - r; 0 where p is."""
    h = d * inv_sum
    x = tl.where(tl.abs(h) < 0.25, _log1p(h), tl.log(tl.where(p == 0, 1.0, 2.0 * p * inv_sum)))
    return tl.where(p == 0, 0.0, x)


@triton.jit
def _js(p_s, p_t, d):
    """v = log(p_s / m) / 2 and the terms of the divergence, m = (p_s + p_t) / 2."""
    total = p_s + p_t
    inv_sum = 1.0 / tl.where(total < 1e-37, 1.0, total)  # of smaller ones the inverse overflows; they add nothing
    v = 0.5 * _log_of_half(p_s, d, inv_sum)
    return v, p_s * v + p_t * 0.5 * _log_of_half(p_t, -d, inv_sum)


@triton.jit
def _score_difference(z_s, z_t):
    """A key that both networks lack adds 0."""
    return tl.where((z_s == NEVER) & (z_t == NEVER), 0.0, z_s - z_t)


@triton.jit
def _difference(e_s, e_t, l_s, rho):
    """p_s - p_t, ρ = l_s / l_t - 1: exactly 0 for equal networks, right at a key that is nearly all of both rows."""
    return ((e_s - e_t) - e_t * rho) / l_s


@triton.jit
def _value(e_s, e_t, l_s, rho, DIVERGENCE: tl.constexpr):
    """v of mse and js, whose gradient by z_s is p_s (v - Σ p_s v), and the terms of their losses."""
    d = _difference(e_s, e_t, l_s, rho)
    if DIVERGENCE == "mse":
        v, terms = d, d * d
    else:
        v, terms = _js(e_s / l_s, e_t * (1.0 + rho) / l_s, d)
    return v, terms


@triton.jit
def _dz(z_s, z_t, m_s, l_s, m_t, rho, c, v_top, g, inv_keys, DIVERGENCE: tl.constexpr):
    """g times a row loss' gradient by z_s; 0 where g is. m to g broadcast to the tile, l is not 0.

    p (v - Σ p v) is taken less v at the likeliest key, c = Σ p (v - v_top): where a row is all but that key, what is
    left there is 1 - p of the terms.
    """
    if DIVERGENCE == "score_mse":
        dz = _score_difference(z_s, z_t) * (2.0 * inv_keys)
    else:
        y_s, y_t = z_s - m_s, z_t - m_t
        e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
        if DIVERGENCE == "kl" or DIVERGENCE == "ce":
            dz = _difference(e_s, e_t, l_s, rho)
        elif DIVERGENCE == "reverse_kl":
            dz = tl.where(e_s == 0, 0.0, e_s / l_s * (((y_s - y_t) - v_top) - c) * LN_2)
        else:
            v, _ = _value(e_s, e_t, l_s, rho, DIVERGENCE)
            dz = e_s / l_s * ((v - v_top) - c)
            if DIVERGENCE == "mse":
                dz = dz * (2.0 * inv_keys)
    return tl.where(g == 0, 0.0, dz * g)


@triton.jit
def _half_scale(top):
    """Return the power of two that brings numbers up to top into [2^14, 2^15), within float16, and its inverse."""
    exponent = tl.maximum(top, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    scale = (0x7F000000 - exponent) + (14 << 23)
    return scale.to(tl.float32, bitcast=True), (exponent - (14 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _half(x):
    """Return rows of bfloat16 as float16, scaled, and the factors that restore them; others as they are.

    float16 holds every bfloat16 exactly down to 2^-31 of its row's largest, and its absolute error is 2^-39 of that.
    """
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        scale, factors = _half_scale(tl.max(tl.abs(x), 1))
        x = (x * scale[:, None]).to(tl.float16)
    else:
        factors = tl.full((x.shape[0],), 1.0, tl.float32)
    return x, factors


@triton.jit
def _add_product(acc, top, carry, dz, x, factors, IS_FLOAT16: tl.constexpr, PRECISION: tl.constexpr):
    """carry acc + dz x, x and factors from _half; carry and top per row, of shape (rows, 1).

    With 16-bit x, dz is scaled by rows and rounded to float16, of float16 networks as two terms, high and low. acc is
    then in units of _half_scale(top), top the largest dz so far.
    """
    if x.dtype == tl.float32:
        acc = tl.dot(dz, x, acc * carry, input_precision=PRECISION)
    else:
        dz = dz * factors[None, :]
        _, unit = _half_scale(top)
        top = tl.maximum(top * carry, tl.max(tl.abs(dz), 1)[:, None])
        scale, _ = _half_scale(top)
        dz = dz * scale
        high = dz.to(tl.float16)
        acc = tl.dot(high, x, acc * (carry * unit * scale))
        if IS_FLOAT16:
            acc = tl.dot((dz - high.to(tl.float32)).to(tl.float16), x, acc)
    return acc, top


@triton.jit
def _add_gradient(acc, top, dz, x, PRECISION: tl.constexpr):
    """acc + dz x, as _add_product has it."""
    half, factors = _half(x)
    return _add_product(acc, top, 1.0, dz, half, factors, x.dtype == tl.float16, PRECISION)


@triton.jit
def _add_scaled(acc, top, carry, other, other_top, share):
    """carry acc + share other, both in units of their tops, as _add_product has them."""
    _, unit = _half_scale(top)
    _, other_unit = _half_scale(other_top)
    top = tl.maximum(top * carry, other_top * tl.abs(share))
    scale, _ = _half_scale(top)
    return acc * (carry * unit * scale) + other * (share * other_unit * scale), top


@triton.jit
def _restored(acc, top, IS_HALF: tl.constexpr):
    """acc of _add_product without its unit."""
    if IS_HALF:
        _, unit = _half_scale(top)
        acc = acc * unit
    return acc


@triton.jit
def _row_weights(weight, b, h, i, in_i, factor, HAS_WEIGHT: tl.constexpr):
    """Load the weights of rows from (pointer, strides of B, H and N_q); rows past the last have 0."""
    if HAS_WEIGHT:
        rows = weight[0] + b * weight[1] + h * weight[2] + i.to(tl.int64) * weight[3]
        return tl.load(rows, mask=in_i, other=0.0).to(tl.float32) * factor
    return tl.where(in_i, factor, 0.0)


@triton.jit
def _whole_rows(z_s, z_t, w, inv_keys, DIVERGENCE: tl.constexpr):
    """Losses of rows that lie whole in a tile, keys down, rows across, and w times their gradients by z_s."""
    if DIVERGENCE == "score_mse":
        d = _score_difference(z_s, z_t)
        loss, dz, g = tl.sum(d * d, 0) * inv_keys, d * (2.0 * inv_keys), w
    else:
        m_s, m_t = tl.max(z_s, 0), tl.max(z_t, 0)
        has_s, has_t = m_s != NEVER, m_t != NEVER
        y_s, y_t = z_s - _base(m_s)[None, :], z_t - _base(m_t)[None, :]
        e_t = tl.exp2(y_t)
        if DIVERGENCE == "kl":  # before other sums, so that y need not be kept beside e
            cross = tl.sum(tl.where(e_t == 0, 0.0, e_t * (y_t - y_s)), 0)
        elif DIVERGENCE == "ce":
            cross = tl.sum(tl.where(e_t == 0, 0.0, e_t * y_s), 0)
        e_s = tl.exp2(y_s)
        l_s, l_t = tl.where(has_s, tl.sum(e_s, 0), 1.0), tl.where(has_t, tl.sum(e_t, 0), 1.0)
        rho = tl.where(has_s, tl.sum(e_s - e_t, 0), 1.0 - l_t) / l_t
        log_ratio = tl.where(tl.abs(rho) < 0.5, _log1p(rho), tl.log(l_s / l_t))
        if DIVERGENCE == "kl" or DIVERGENCE == "ce":
            dz = _difference(e_s, e_t, l_s[None, :], rho[None, :])
            loss = cross / l_t * LN_2
            loss = loss + log_ratio if DIVERGENCE == "kl" else tl.log(l_s) - loss
        else:
            y_top = tl.max(tl.where(y_s == 0, y_t, NEVER), 0)
            if DIVERGENCE == "reverse_kl":
                v = tl.where(e_s == 0, 0.0, (y_s - y_t) + y_top[None, :]) * LN_2
                c = tl.sum(e_s * v, 0) / l_s
                loss = tl.where(has_s, c - y_top * LN_2 - log_ratio, 0.0)
            else:
                v, terms = _value(e_s, e_t, l_s[None, :], rho[None, :], DIVERGENCE)
                v_top, _ = _value(1.0, tl.exp2(y_top), l_s, rho, DIVERGENCE)
                v = v - v_top[None, :]
                c = tl.sum(e_s * v, 0) / l_s
                loss = tl.sum(terms, 0)
                if DIVERGENCE == "mse":
                    loss, v, c = loss * inv_keys, v * (2.0 * inv_keys), c * (2.0 * inv_keys)
            dz = tl.where(e_s == 0, 0.0, e_s / l_s[None, :] * (v - c[None, :]))
        loss, g = tl.where(has_t, loss, 0.0), tl.where(has_s & has_t, w, 0.0)
    return tl.where(w == 0, 0.0, loss * w), tl.where((g == 0)[None, :], 0.0, dz * g[None, :])
