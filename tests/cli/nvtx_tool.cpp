// SPDX-License-Identifier: Apache-2.0
// A tool that reads NVTX, as Nsight Systems would: at the process's end it writes "domain name count" for every name of a
// range to the file $SLUICE_NVTX_OUT, and "unbalanced N" if a thread closed more ranges than it opened or the reverse.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace {

std::mutex mutex;
std::deque<std::string> names;   // of domains and strings; their addresses are the handles
std::map<std::string, int> counts;
int unbalanced = 0;
std::map<std::thread::id, int> depths;   // not thread_local: LeakSanitizer fails on a loaded library's

const void* keep(const char* name) {
  const std::lock_guard lock(mutex);
  return &names.emplace_back(name);
}

nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  return reinterpret_cast<nvtxDomainHandle_t>(const_cast<void*>(keep(name)));
}

nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t, const char* name) {
  return reinterpret_cast<nvtxStringHandle_t>(const_cast<void*>(keep(name)));
}

int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const std::lock_guard lock(mutex);
  ++counts[*reinterpret_cast<const std::string*>(domain) + ' ' +
           *reinterpret_cast<const std::string*>(event->message.registered)];
  return depths[std::this_thread::get_id()]++;
}

int NVTX_API pop(nvtxDomainHandle_t) {
  const std::lock_guard lock(mutex);
  const int depth = --depths[std::this_thread::get_id()];
  if (depth < 0) ++unbalanced;
  return depth;
}

void write_counts() {
  std::FILE* out = std::fopen(std::getenv("SLUICE_NVTX_OUT"), "w");
  if (out == nullptr) return;
  for (const auto& [name, count] : counts) std::fprintf(out, "%s %d\n", name.c_str(), count);
  for (const auto& [thread, depth] : depths) unbalanced += depth != 0;
  std::fprintf(out, "unbalanced %d\n", unbalanced);
  std::fclose(out);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t table_of) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(table_of(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks == nullptr || callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) return 0;
  const auto set = [&](unsigned id, auto function) { *table[id] = reinterpret_cast<NvtxFunctionPointer>(function); };
  set(NVTX_CBID_CORE2_DomainCreateA, create_domain);
  set(NVTX_CBID_CORE2_DomainRegisterStringA, register_string);
  set(NVTX_CBID_CORE2_DomainRangePushEx, push);
  set(NVTX_CBID_CORE2_DomainRangePop, pop);
  std::atexit(write_counts);
  return 1;
}
