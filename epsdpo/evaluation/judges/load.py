"""From the `evaluate.judge` section to a judge that can be asked. Torch is loaded only for judges that run here."""

from epsdpo.evaluation.judges.comparison import Judge
from epsdpo.experiment.sections.judge import JudgeSection


def load_judge(settings: JudgeSection, label_temperature: float) -> Judge:
    """The judge that a config names, with its model loaded where it runs here.

    Args:
        label_temperature: of the embedded world, for the gold judge.

    Raises:
        JudgeError: if its key is missing or its model cannot be loaded.
        ValueError, OSError: if its template cannot be used.
    """
    if settings.kind == "chat":
        from epsdpo.evaluation.judges.chat import ChatJudge

        return ChatJudge(settings)
    if settings.kind == "gold":
        from epsdpo.evaluation.judges.gold import GoldJudge

        return GoldJudge(label_temperature)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from epsdpo.evaluation.judges.causal_lm import CausalLMJudge
    from epsdpo.evaluation.judges.pair_ranker import PairRankerJudge, PairRankerModel
    from epsdpo.evaluation.judges.reward import RewardModelJudge
    from epsdpo.models.weights import load_judge_model

    model_class, judge_class = {
        "causal_lm": (AutoModelForCausalLM, CausalLMJudge),
        "reward_model": (AutoModelForSequenceClassification, RewardModelJudge),
        "pair_ranker": (PairRankerModel, PairRankerJudge),
    }[settings.kind]
    return judge_class(*load_judge_model(model_class, settings), settings)
