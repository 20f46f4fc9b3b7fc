"""In which arithmetic the released code decides: nothing in it says so, the way of launching it does.

Measured by running it in its own stack (trl 0.13, accelerate 1.2, DeepSpeed 0.16). With `bf16: true`, ZeRO casts models
and leaves everything in bfloat16; elsewhere accelerate runs both forwards under autocast and hands their logits on in
float32.
"""

# Values of `criterion_dtype` -> what they are, for reports.
CRITERION_DTYPES = {
    "float32": "exact",
    "bfloat16": "all bfloat16",
    "bfloat16_logits": "bfloat16 logits",
    "float16": "all float16",
}
IN_WORDS = CRITERION_DTYPES | {"float16_logits": "float16 logits"}  # of a launch, and nothing here computes so

PUBLISHED = "bfloat16"  # by the launch that was released with the code: DeepSpeed ZeRO-3 with bf16


def arithmetic_of(mixed_precision: str, zero: bool, weights: str) -> str:
    """The arithmetic of the released code's criterion under a launch, by its name in `IN_WORDS`.

    Args:
        mixed_precision: accelerate's "no", "bf16" or "fp16".
        zero: whether DeepSpeed holds the models.
        weights: dtype that they were loaded in, such as "bfloat16".
    """
    if mixed_precision == "no":
        return weights
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[mixed_precision]
    return dtype if zero else f"{dtype}_logits"
