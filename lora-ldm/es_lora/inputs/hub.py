"""Whether the Hugging Face hub answers: asked once, for a few seconds at most."""

import http.client
import ssl
import threading
import urllib.error
import urllib.request
from functools import lru_cache
from typing import List

ANSWER_SEC = 5


def hub_answers() -> bool:
    """Whether the hub can be reached: else its client would ask again and again for a minute."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT)


@lru_cache(maxsize=None)
def answers(endpoint: str) -> bool:
    """Whether something answers at a URL within ANSWER_SEC, through the proxy where there is one.

    The question is a thread's: the time-out of a request does not count the search for its address.
    """
    heard: List[bool] = []
    asking = threading.Thread(target=lambda: heard.append(_asked(endpoint)), daemon=True)
    asking.start()
    asking.join(ANSWER_SEC)
    return bool(heard and heard[0])


def _asked(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=ANSWER_SEC).close()
    except urllib.error.HTTPError:
        return True  # it refuses this request, but it is there
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # its client brings certificates of its own
    except (OSError, http.client.HTTPException, ValueError):
        return False
    return True
