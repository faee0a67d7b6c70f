"""Questions about a file: it is read once, every further question costs only its own tokens."""

import sys
from pathlib import Path

from hipserve import HiPConfig
from hipserve.models import Conversation, load

path = sys.argv[1] if len(sys.argv) > 1 else "README.md"
secret = "The pass key is 83724. Remember it. 83724 is the pass key."

talk = Conversation(load(config=HiPConfig(refresh_interval=1)))
talk.say(f"Read the text.\n\n{Path(path).read_text(encoding='utf-8')}\n{secret}")
for question in ("What is the pass key?", "What is the pass key? Tell me again."):
    print(">", question)
    print(talk.ask(question))
    cost = talk.statistics
    print(f"  {cost.prompt_tokens} tokens, {cost.cached_tokens} of them read before")
