"""P-tuning v2."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adapterlab.core.adapter import Copy
from adapterlab.core.carrier import Carrier
from adapterlab.core.targets import Targets
from adapterlab.engine.wrapping import plain_copy
from adapterlab.foreign.model import task_heads
from adapterlab.methods.prompt.prefix_tuning import PrefixTuning
from adapterlab.registry import register


@register
class PTuningV2(PrefixTuning):
    """Train P key-value pairs for every attention layer directly, and the head that classifies sequences or tokens.

    K ← [P_K ; K], V ← [P_V ; V] as in prefix tuning, with dropout on the pairs and no network that makes them. The
    head is the model's own: a linear map of the pooled state or of each token's, with what pools before it. It is
    trained and saved whole, whether its checkpoint had it or not; the language model's own head stays frozen.

    Where it attaches: as prefix tuning, for example in the upper layers alone with `targets`. Outputs keep their
    length, so labels of tokens stay where they are; real tokens start at position P.

    Start: not the base's output: pairs from a standard normal distribution, as in the authors' code.

    Trainable parameters: 2 P L n_kv hd, and the head's.

    Inference: not mergeable; each layer attends to P more keys. HF PEFT has it as prefix tuning with modules to save.

    The authors freeze the pooler; here it trains, since many checkpoints have none. Short prompts (below 20) suit
    simple classification, long ones (about 100) labels of tokens; rates and lengths differ by a factor of ten from
    task to task. `hidden` puts the network of prefix tuning back, which helps on some tasks and harms on others.

    Rate: 5e-3, from the authors' runs, which take 5e-3 to 3e-2.

    Reference: "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
    arXiv 2110.07602.

    Example:
        >>> from adapterlab.methods.prompt.p_tuning_v2 import PTuningV2
        >>> PTuningV2(length=8).init
        'normal'
    """

    formula: ClassVar[str] = "2 P L n_kv hd + the head's"

    init: Literal["words", "normal", "zeros"] = Field(
        "normal", description="start: keys and values of real words, standard normal numbers, or zeros"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the pairs; the authors take the model's own")
    head: bool = Field(True, description="train the head that classifies, and its pooler, whole")

    def attach(self, host: Carrier, name: str) -> None:
        """Put pairs into every layer, then trained copies of the head in its place."""
        super().attach(host, name)
        named = host.sites(Targets(include=self.modules_to_save)) if self.modules_to_save else []
        taken = {site.path for site in named}
        for path in task_heads(host.model) if self.head else ():
            if path not in taken:
                site = host.site(host.model.get_submodule(path))
                host.wrap(name, site, Copy(site, plain_copy(site.module)))
