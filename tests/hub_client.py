"""A process of its own that loads and pushes with the real client: HF_ENDPOINT is read once, when it is imported.

One JSON request per line on standard input, one JSON answer per line on standard output.
"""

import hashlib
import json
import os
import sys

from msa_unet import MSAUnet


def digest(model: MSAUnet) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def answer(do: str, name: str, **options: object) -> dict[str, str]:
    if do == "become":  # permissions do not bind root
        os.setuid(int(name))
        return {}
    if do == "push":
        model = MSAUnet.from_pretrained(str(options.pop("folder")))
        return {"commit": model.push_to_hub(name, **options)}
    return {"digest": digest(MSAUnet.from_pretrained(name, **options))}


if __name__ == "__main__":
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            result = answer(**json.loads(line))
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(result), flush=True)
