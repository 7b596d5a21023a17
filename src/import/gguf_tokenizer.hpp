// SPDX-License-Identifier: Apache-2.0
// tokenizer.ggml.* keys of a GGUF file, as a tokenizer specification.
#pragma once

#include "import/gguf.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

// Reads tokenizers of model "gpt2" (byte-level BPE) and "llama" (SentencePiece-style BPE with scores). A file without a
// tokenizer gives TokenizerModel::none and a warning. At most `vocab` tokens are kept.
// Errors: corrupt, unsupported (another model or pre-tokenizer, named).
Result<storage::TokenizerSpec> read_gguf_tokenizer(const Gguf& gguf, uint32_t vocab, const LogHook& log);

}  // namespace sluice::import
