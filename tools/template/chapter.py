# ---
# jupyter:
#   algokit:
#     part: __PART__
#     slug: __SLUG__
#     promise: "One sentence: what the reader gains."
#     papers: []
#     api:
#     - algokit.__PART__.__SLUG__.compensated_sum
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # __TITLE__

# %% tags=["setup"]
# Set-up: installs the book's package where it is missing (as in Colab), then imports.
try:
    import algokit.plotting
except ModuleNotFoundError:
    package = "algokit-book @ git+__URL__"
    get_ipython().run_line_magic("pip", f"install --quiet '{package}'")
    import algokit.plotting

import math

import matplotlib.pyplot as plt
import numpy as np

from algokit.__PART__.__SLUG__ import compensated_sum
from algokit.claims import at_most, claim
from algokit.plotting import COLORS

algokit.plotting.use_book_style()

# %% [markdown]
# ## The problem
#
# What goes wrong with the usual way, with a picture in the first screenful. (This scaffold is a tiny chapter on summation that passes every check; replace it section by section.)

# %% mystnb={"figure": {"caption": "Error of the running sum of 0.1, in single precision, against the number of terms.", "name": "fig-__SLUG__-problem"}, "image": {"alt": "The error of the plain running sum grows with the number of terms; that of the compensated sum stays at the bottom of the plot."}} tags=["thumbnail", "hide-input"]
sizes = 10 ** np.arange(1, 6)
x = np.full(sizes[-1], 0.1, dtype=np.float32)
exact = sizes * float(x[0])
plain = [abs(float(np.cumsum(x[:n])[-1]) - e) / e for n, e in zip(sizes, exact, strict=True)]
ours = [abs(compensated_sum(x[:n]) - e) / e for n, e in zip(sizes, exact, strict=True)]
fig, ax = plt.subplots()
ax.loglog(sizes, np.maximum(plain, 1e-9), "o-", color=COLORS["orange"], label="plain")
ax.loglog(sizes, np.maximum(ours, 1e-9), "o-", color=COLORS["blue"], label="compensated")
ax.set(xlabel="terms", ylabel="relative error")
ax.legend()
plt.show()

# %% [markdown]
# ## Derivation
#
# In $s=\mathrm{fl}(a+b)$ with $|a|\ge|b|$ the part of $b$ that was lost is known exactly:
#
# $$
# e=(a-s)+b .
# $$ (eq-__SLUG__-lost)

# %%
a, b = 1e16, 1.0
s = a + b
print("lost:", (a - s) + b)

# %% [markdown]
# ## The algorithm
#
# ```{prf:algorithm} Compensated sum
# :label: alg-__SLUG__
#
# 1. $s\leftarrow x_1$, $c\leftarrow0$
# 2. **for** $i=2,\dots,n$: $t\leftarrow s+x_i$; add {eq}`eq-__SLUG__-lost` to $c$; $s\leftarrow t$
# 3. **return** $s+c$
# ```


# %%
def reference(x):
    """Algorithm 1, line by line."""
    s, c = x[0], 0.0
    for term in x[1:]:
        t = s + term
        c += (s - t) + term if abs(s) >= abs(term) else (term - t) + s
        s = t
    return s + c


print(reference([1.0, 1e100, 1.0, -1e100]))

# %% [markdown]
# ## The fast version
#
# What makes it slow, what the kernel does about it, agreement, and how cost grows.
#
# ## The claims

# %%
worst = {}
for seed in range(3):
    values = np.random.default_rng(seed).normal(size=10_000)
    worst[f"seed {seed}"] = abs(compensated_sum(values) - math.fsum(values)) / (2 * np.finfo(float).eps * abs(values).sum())
claim(
    "__SLUG__/bound",
    "The error stays within the bound, whatever the number of terms (error over bound).",
    source="the bound in section 2",
    measured={k: round(v, 2) for k, v in worst.items()},
    rule=at_most(1),
    digits=1,
)

# %% [markdown]
# ## Where it breaks
#
# ## Use it
#
# ## Exercises

# %% [markdown]
# ```{exercise} Order of the terms
# :label: ex-__SLUG__-1
#
# Does sorting the terms help the plain sum?
# ```

# %% [markdown]
# ````{solution-start} ex-__SLUG__-1
# :class: dropdown
# ````

# %%
values = np.random.default_rng(0).lognormal(0, 3, 20_000).astype(np.float32)
errors = [abs(float(np.cumsum(v)[-1]) - math.fsum(values)) for v in (values, np.sort(values))]
print("ascending order is better:", errors[1] < errors[0])

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Further reading
