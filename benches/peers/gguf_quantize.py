"""Quantises a GGUF file with llama.cpp's own quantiser."""

import ctypes

import llama_cpp

FORMS = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source, target, form, threads):
    """Writes `target` in `form`, one of `FORMS`, each tensor as llama.cpp chooses by default."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FORMS[form]
    params.nthread = threads
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"llama_model_quantize answered {code} for {source}")
