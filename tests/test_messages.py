import pytest

from unet_ray.messages import reason_of

# Texts of TensorFlow 2.21.
NODE = (
    "Graph execution error:\n\nDetected at node zeros defined at (most recent call last):\n<stack traces unavailable>\n"
)
OUT_OF_MEMORY = "OOM when allocating tensor with shape[8192] and type float on /device:GPU:0 by allocator GPU_0_bfc"
HINT = "\n\t [[{{node zeros}}]]\nHint: If you want to see a list of allocated tensors\n [Op:__inference_f_29]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NODE + OUT_OF_MEMORY + HINT, OUT_OF_MEMORY),
        (f"{{{{function_node __wrapped__Fill_device_}}}} {OUT_OF_MEMORY} [Op:Fill] name: ", OUT_OF_MEMORY),
        (
            "2 root error(s) found.\n  (0) INVALID_ARGUMENT: indices[0] = 7 is not in [0, 2)\n\t [[{{node Gather}}]]\n"
            "0 successful operations.\n0 derived errors ignored. [Op:__inference_h_27]",
            "INVALID_ARGUMENT: indices[0] = 7 is not in [0, 2)",
        ),
        ('Traceback (most recent call last):\n  File "a.py", line 3, in f\nKeyError: 7', "KeyError: 7"),
        ("plain", "plain"),
        ("", "no reason was given"),
    ],
)
def test_the_line_that_says_what_went_wrong(text, reason):
    assert reason_of(RuntimeError(text)) == reason
