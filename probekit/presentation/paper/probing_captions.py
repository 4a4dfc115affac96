"""Captions and alternative texts of the figures of the inside."""

from __future__ import annotations

import numpy as np

from probekit.presentation.paper.captions import of_each
from probekit.presentation.paper.probing_figures import reach_of, shares_of
from probekit.presentation.study_folder import StudyFolder


def of_probes(study: StudyFolder) -> str:
    return (
        "What the residual stream knows, by layer. Above: AUROC with which a logistic probe tells accepted drafts of "
        "an exit, of the residual, of the lens's probability, entropy and margin, of both, of the position, and of "
        "shuffled labels. Below: share of the model's tokens that a ridge map to the last residual finds, that the "
        "lens says, and that the mean residual gives. Always on prompts that the probe was not fitted on. Bands: 95 % "
        "intervals, bootstrap over prompts; of shuffled labels, over the shuffles."
    )  # fmt: skip


def of_attribution(study: StudyFolder) -> str:
    return (
        "Which layers wrote what the model says: what each layer's attention and MLP added to the logit of the model's "
        "next token at each position of one text (direct logit attribution, the final norm's scale held; with the "
        "embedding's share and constants the cells of a column add up to the logit). Blue raises the logit, red lowers "
        "it; one cell of fifty lies beyond the ends of its colours. Left of the line the prompt goes on; right of it "
        "the model writes, and in greedy text its next token is the one that the next column reads. Layer l leads from "
        "the residual h[l - 1] to h[l]."
    )  # fmt: skip


def alt_of_probes(study: StudyFolder) -> str:
    def leads(model: str) -> str:
        table = study.of("probes", model)
        parts = []
        for label, kinds in (("accepted", ("probe", "confidence")), ("answer", ("probe", "lens"))):
            rows = table[(table["label"] == label) & table["kind"].isin(kinds)]
            rows = rows.drop_duplicates(["layer", "kind"])
            both = rows.pivot(index="layer", columns="kind", values="value").reindex(columns=list(kinds)).dropna()
            if both.empty:
                parts.append(f"no probe of {'acceptance' if label == 'accepted' else 'the answer'}")
                continue
            lead = (both[kinds[0]] - both[kinds[1]]).to_numpy()
            place = int(lead.argmax())
            one, other = (float(both[kind].iloc[place]) for kind in kinds)
            what = "the residual's AUROC" if label == "accepted" else "a linear map's share of tokens"
            parts.append(
                f"{what} leads the lens's most at layer {int(both.index[place])}, {one:.2f} against {other:.2f}"
            )
        return "; ".join(parts)

    return f"Curves over layers, two panels a model. {of_each(study, leads, between='. ')}."


def alt_of_attribution(study: StudyFolder) -> str:
    def greatest(model: str) -> str:
        shares = shares_of(study, model)
        if reach_of(shares) is None:
            return "not known"
        means = shares.groupby("term")["logit"].mean()
        parts = means[[":" in str(term) for term in means.index]]
        kind, _, layer = str(parts.index[int(np.argmax(parts.to_numpy()))]).partition(":")
        who = f"the {'MLP' if kind == 'mlp' else kind} of layer {int(layer) + 1}"
        return f"{who} raises it most, by {parts.max():.1f} logits in the mean"

    maps = "Heat maps, layers upwards, positions to the right, attention before MLPs."
    return f"{maps} {of_each(study, greatest)}."
