// SPDX-License-Identifier: Apache-2.0
// What a manifest must satisfy before anything uses its numbers. Reader and writer both run it.
#pragma once

#include <cstdint>
#include <string>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::storage {

// Checks, in this order: hyperparameters, RoPE, tokenizer, generation defaults; every tensor's shape against its role and
// the architecture, its scheme, layout and group; every plane's kind, size and place (planes fill the file from
// kHeaderBytes to `planes_end` without gap or overlap, in manifest order); that every tensor the architecture needs is there
// once. Reads only `manifest`, and does no arithmetic that its numbers could overflow.
// Errors: corrupt, unsupported (something a newer version may write); the message names `path`, tensor and figure.
Status check_manifest(const Manifest& manifest, uint64_t planes_end, const std::string& path);

}  // namespace sluice::storage
