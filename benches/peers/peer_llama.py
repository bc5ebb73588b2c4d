"""Measures llama.cpp through llama-cpp-python, with vision where a vision file is given.

settings: `model`, a GGUF file; `vision`, the GGUF file of tower and projector; `picture`, a file; `llama`, further
arguments of `llama_cpp.Llama`.
"""

import base64
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import worker
from figures import AFTER, BEFORE, CONTEXT, IMAGE
from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler

SILENCE = llama_cpp.llama_log_callback(lambda level, text, data: None)
KV = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


class LlamaCpp:
    def __init__(self, settings, threads):
        self.settings, self.threads = settings, threads
        self.model = self.handler = None
        self.chosen = 0
        if not settings.get("vision"):
            self.encode = self.first_token = self.second_question = None
        else:
            uri = base64.b64encode(Path(settings["picture"]).read_bytes()).decode()
            self.picture = f"data:image/png;base64,{uri}"

    def load(self):
        more = dict(self.settings.get("llama", {}))
        kv = KV[more.pop("kv", "f16")]
        if self.settings.get("vision"):
            self.handler = Llava15ChatHandler(self.settings["vision"], verbose=False)
        self.model = llama_cpp.Llama(
            self.settings["model"],
            n_ctx=CONTEXT,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            type_k=kv,
            type_v=kv,
            chat_handler=self.handler,
            verbose=False,
            **more,
        )
        if self.handler:
            mtmd_cpp.mtmd_log_set(SILENCE, None)
            mtmd_cpp.mtmd_helper_log_set(SILENCE, None)
            self.handler.mtmd_ctx = self.vision_context()

    def vision_context(self):
        """What the handler would make with the first question, with flash attention chosen apart from the text's."""
        parameters = mtmd_cpp.mtmd_context_params_default()
        parameters.use_gpu, parameters.print_timings, parameters.n_threads = False, False, self.threads
        flash = self.settings.get("vision_flash_attn", True)
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        context = mtmd_cpp.mtmd_init_from_file(str(self.settings["vision"]).encode(), self.model.model, parameters)
        if context is None:
            worker.fail(f"llama.cpp does not take {self.settings['vision']}")
        return context

    def reset(self):
        self.model.reset()

    def read(self, tokens):
        self.model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        self.chosen = int(np.argmax(np.ctypeslib.as_array(logits, (self.model.n_vocab(),))))

    def step(self):
        self.read([self.chosen])

    def rewind(self, length):
        self.model.n_tokens = length

    def encode(self):
        """Encoder and projector of a picture that is pixels already."""
        context = self.handler.mtmd_ctx
        bitmap = self.handler._create_bitmap_from_bytes(Path(self.settings["picture"]).read_bytes())
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        text = mtmd_cpp.mtmd_input_text()
        marker = mtmd_cpp.mtmd_default_marker()
        text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
        try:
            code = mtmd_cpp.mtmd_tokenize(
                context, chunks, ctypes.byref(text), (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap), 1
            )
            if code:
                worker.fail(f"mtmd_tokenize answered {code}")
            for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
                chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, index)
                if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    if mtmd_cpp.mtmd_encode_chunk(context, chunk):
                        worker.fail("mtmd_encode_chunk failed")
                    size = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk) * self.model.n_embd()
                    self.embeds = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), (size,)).copy()
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def ask(self, question):
        """One token of the answer to a question about the picture, by the library's chat interface."""
        content = [{"type": "image_url", "image_url": {"url": self.picture}}, {"type": "text", "text": question}]
        self.model.create_chat_completion([{"role": "user", "content": content}], max_tokens=1, temperature=0.0)
        return self.model.n_tokens

    def first_token(self):
        self.ask(self.question("What"))

    def second_question(self):
        self.ask(self.question("Where"))

    def question(self, word):
        """Words that fill the prompt up to 640 positions with the template around them."""
        # As the handler's template comes out: it trims line ends.
        head, tail = f"{Llava15ChatHandler.DEFAULT_SYSTEM_MESSAGE}USER: ", "ASSISTANT: "
        room = BEFORE + AFTER - len(self.model.tokenize(head.encode(), add_bos=True))
        question = word
        while len(self.model.tokenize((question + " a" + tail).encode(), add_bos=False)) <= room:
            question += " a"
        return question

    def before_second_question_best(self):
        self.reset()
        self.read(worker.tokens(BEFORE + IMAGE + AFTER))
        self.rewind(BEFORE + IMAGE)

    def second_question_best(self):
        self.read(worker.tokens(AFTER, seed=2))


if __name__ == "__main__":
    options = worker.arguments(__doc__)
    worker.run(LlamaCpp(options.settings, options.threads), options)
