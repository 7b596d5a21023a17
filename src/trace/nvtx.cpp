// SPDX-License-Identifier: Apache-2.0
#include "trace/nvtx.hpp"

#ifdef SLUICE_NVTX

#include <nvtx3/nvToolsExt.h>

#include <array>
#include <string>

namespace sluice::trace {
namespace {

// The tool's handles of the domain and of the names; all null without a tool.
struct Domain {
  Domain() {
    if (handle == nullptr) return;
    for (size_t kind = 0; kind < names.size(); ++kind) {
      names[kind] = nvtxDomainRegisterStringA(handle, std::string(name_of(static_cast<Kind>(kind))).c_str());
    }
  }

  const nvtxDomainHandle_t handle = nvtxDomainCreateA("sluice");
  std::array<nvtxStringHandle_t, static_cast<size_t>(Kind::count)> names{};
};

const Domain& domain() {
  static const Domain domain;
  return domain;
}

}  // namespace

bool nvtx_attached() { return domain().handle != nullptr; }

void NvtxRange::push(Kind kind, uint16_t layer) {
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
  event.message.registered = domain().names[static_cast<size_t>(kind)];
  if (layer != Record::kNoLayer) {
    event.payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
    event.payload.ullValue = layer;
  }
  nvtxDomainRangePushEx(domain().handle, &event);
}

void NvtxRange::pop() { nvtxDomainRangePop(domain().handle); }

}  // namespace sluice::trace

#else

namespace sluice::trace {

bool nvtx_attached() { return false; }
void NvtxRange::push(Kind, uint16_t) {}
void NvtxRange::pop() {}

}  // namespace sluice::trace

#endif
