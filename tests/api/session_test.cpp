// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "golden_model.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

const std::vector<int32_t> kPrompt = {3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 28, 84, 19, 71};

struct Fixture {
  Fixture() : path(folder.file("model.sluice")) { import_golden("llama3", path, WeightFormat::int4, 32); }
  Model open(uint32_t sessions = 1, uint32_t context = 256) const {
    return open_or_fail(path, {.context = context, .sessions = sessions});
  }
  TempFolder folder;
  std::string path;
};

std::vector<int32_t> continue_greedily(Session& session, uint32_t tokens, StopReason wanted = StopReason::max_tokens) {
  std::vector<int32_t> ids;
  const auto reason = session.generate({.max_tokens = tokens, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                                       [&](const Token& token) {
                                         ids.push_back(token.id);
                                         return true;
                                       });
  INFO((reason ? std::string() : reason.error().message));
  REQUIRE(reason);
  CHECK(*reason == wanted);
  return ids;
}

Session session_with(const Model& model, std::span<const int32_t> tokens) {
  auto session = model.new_session();
  REQUIRE(session);
  REQUIRE(session->append(tokens));
  return std::move(*session);
}

}  // namespace

TEST_CASE("a generation in pieces is the generation in one go") {
  const Fixture fixture;
  const Model model = fixture.open(2);
  Session whole = session_with(model, kPrompt);
  const std::vector<int32_t> expected = continue_greedily(whole, 20);
  Session pieces = session_with(model, std::span(kPrompt).first(5));
  REQUIRE(pieces.flush());
  REQUIRE(pieces.append(std::span(kPrompt).subspan(5)));
  REQUIRE(pieces.flush());
  std::vector<int32_t> ids;
  for (const uint32_t count : {1u, 7u, 12u}) {
    const std::vector<int32_t> part = continue_greedily(pieces, count);
    ids.insert(ids.end(), part.begin(), part.end());
  }
  CHECK(ids == expected);
}

TEST_CASE("a truncated session goes on as if what was cut had never been") {
  const Fixture fixture;
  const Model model = fixture.open();
  Session session = session_with(model, kPrompt);
  const std::vector<int32_t> first = continue_greedily(session, 12);
  REQUIRE(session.truncate(static_cast<uint32_t>(kPrompt.size())));
  CHECK(continue_greedily(session, 12) == first);
  // Other tokens of the same number: the logits kept for the old ones must not be used.
  REQUIRE(session.truncate(static_cast<uint32_t>(kPrompt.size())));
  REQUIRE(session.flush());
  REQUIRE(session.truncate(4));
  REQUIRE(session.append(std::span(kPrompt).subspan(4)));
  CHECK(continue_greedily(session, 12) == first);
  const Status beyond = session.truncate(1000);
  REQUIRE(!beyond);
  CHECK(beyond.error().code == ErrorCode::usage);
}

TEST_CASE("a fork and its origin go different ways from the same past") {
  const Fixture fixture;
  const Model model = fixture.open(2);
  Session origin = session_with(model, kPrompt);
  REQUIRE(origin.flush());
  auto fork = origin.fork();
  REQUIRE(fork);
  const std::vector<int32_t> expected = continue_greedily(origin, 10);
  REQUIRE(fork->append(std::vector<int32_t>{7, 8, 9}));
  const std::vector<int32_t> other = continue_greedily(*fork, 10);
  CHECK(other != expected);
  REQUIRE(fork->truncate(static_cast<uint32_t>(kPrompt.size())));
  CHECK(continue_greedily(*fork, 10) == expected);
  const auto third = origin.fork();
  REQUIRE(!third);
  CHECK(third.error().code == ErrorCode::budget);
}

TEST_CASE("closing a session makes room for another") {
  const Fixture fixture;
  const Model model = fixture.open(1);
  {
    auto session = model.new_session();
    REQUIRE(session);
    const auto second = model.new_session();
    REQUIRE(!second);
    CHECK(second.error().code == ErrorCode::budget);
  }
  CHECK(model.new_session());
}

TEST_CASE("a saved session restored into a new opening of the model goes on the same way") {
  const Fixture fixture;
  const std::string saved = fixture.folder.file("session.bin");
  std::vector<int32_t> expected;
  {
    const Model model = fixture.open();
    Session session = session_with(model, kPrompt);
    continue_greedily(session, 5);
    REQUIRE(session.save(saved));
    expected = continue_greedily(session, 15);
  }
  const Model model = fixture.open();
  Session session = session_with(model, std::vector<int32_t>{1, 2, 3});
  REQUIRE(session.flush());
  REQUIRE(session.restore(saved));
  CHECK(session.tokens().size() == kPrompt.size() + 5);
  CHECK(continue_greedily(session, 15) == expected);
}

TEST_CASE("a saved session that is damaged, cut or of another model is refused and changes nothing") {
  const Fixture fixture;
  const Model model = fixture.open();
  const std::string saved = fixture.folder.file("session.bin");
  Session session = session_with(model, kPrompt);
  REQUIRE(session.flush());
  REQUIRE(session.save(saved));
  const std::string good = read_whole(saved);
  const auto refused = [&](const std::string& bytes) {
    const std::string path = fixture.folder.file("bad.bin");
    std::ofstream(path, std::ios::binary) << bytes;
    const Status status = session.restore(path);
    REQUIRE(!status);
    CHECK(status.error().message.find(path) != std::string::npos);
    CHECK(session.tokens().size() == kPrompt.size());
    return status.error().code;
  };
  CHECK(refused("") == ErrorCode::corrupt);
  CHECK(refused("not a session at all, but long enough to hold the header that one has, and then some more") ==
        ErrorCode::corrupt);
  CHECK(refused(good.substr(0, good.size() - 1)) == ErrorCode::corrupt);
  for (const size_t at : {size_t{12}, size_t{100}, good.size() / 2, good.size() - 1}) {
    std::string flipped = good;
    flipped[at] = static_cast<char>(flipped[at] ^ 4);
    CHECK(refused(flipped) == ErrorCode::corrupt);
  }
  std::string newer = good;
  newer[8] = 2;
  CHECK(refused(newer) == ErrorCode::unsupported);
  std::string other = good;
  other[24] = other[24] == 'a' ? 'b' : 'a';
  CHECK(refused(other) == ErrorCode::usage);
  const Status absent = session.restore(fixture.folder.file("absent.bin"));
  REQUIRE(!absent);
  CHECK(absent.error().code == ErrorCode::not_found);
}

TEST_CASE("a save that cannot be written leaves neither the file nor a temporary one") {
  const Fixture fixture;
  const Model model = fixture.open();
  Session session = session_with(model, kPrompt);
  REQUIRE(session.flush());
  const Status status = session.save(fixture.folder.file("no/such/folder/session.bin"));
  REQUIRE(!status);
  CHECK(status.error().code == ErrorCode::io);
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(fixture.folder.path())) ++files;
  CHECK(files == 1);
}

TEST_CASE("tokens beyond the context or the vocabulary are refused whole, and a full context ends a generation") {
  const Fixture fixture;
  const Model model = fixture.open(1, 30);
  Session session = session_with(model, kPrompt);
  const Status outside = session.append(std::vector<int32_t>{1, 512});
  REQUIRE(!outside);
  CHECK(outside.error().code == ErrorCode::usage);
  const Status negative = session.append(std::vector<int32_t>{-1});
  REQUIRE(!negative);
  const Status full = session.append(std::vector<int32_t>(11, 1));
  REQUIRE(!full);
  CHECK(full.error().code == ErrorCode::budget);
  CHECK(session.tokens().size() == kPrompt.size());
  CHECK(continue_greedily(session, 100, StopReason::context_full).size() == 10);
  CHECK(continue_greedily(session, 100, StopReason::context_full).empty());
}

TEST_CASE("an empty sequence has nothing to continue") {
  const Fixture fixture;
  const Model model = fixture.open();
  auto session = model.new_session();
  REQUIRE(session);
  const auto reason = session->generate({}, [](const Token&) { return true; });
  REQUIRE(!reason);
  CHECK(reason.error().code == ErrorCode::usage);
}

TEST_CASE("the callback, and cancel from another thread, end a generation that can be taken up again") {
  const Fixture fixture;
  const Model model = fixture.open(2, 2048);
  Session whole = session_with(model, kPrompt);
  const std::vector<int32_t> expected = continue_greedily(whole, 8);
  Session session = session_with(model, kPrompt);
  std::vector<int32_t> ids;
  const GenerateOptions options{.max_tokens = 1000, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true};
  auto reason = session.generate(options, [&](const Token& token) {
    ids.push_back(token.id);
    return ids.size() < 3;
  });
  REQUIRE(reason);
  CHECK(*reason == StopReason::cancelled);
  const std::vector<int32_t> rest = continue_greedily(session, 5);
  ids.insert(ids.end(), rest.begin(), rest.end());
  CHECK(ids == expected);

  std::optional<std::thread> other;
  reason = session.generate({.max_tokens = 100000, .sampling = {}, .stop = {}, .ignore_eos = true}, [&](const Token&) {
    if (!other) other.emplace([&] { session.cancel(); });
    return true;
  });
  other->join();
  REQUIRE(reason);
  CHECK(*reason == StopReason::cancelled);
}

TEST_CASE("two sessions generate in two threads what each generates alone") {
  const Fixture fixture;
  const Model model = fixture.open(2);
  const std::vector<int32_t> prompts[] = {kPrompt, {400, 300, 200, 100}};
  std::vector<int32_t> alone[2], together[2];
  for (int i = 0; i < 2; ++i) {
    Session session = session_with(model, prompts[i]);
    alone[i] = continue_greedily(session, 40);
  }
  Session sessions[] = {session_with(model, prompts[0]), session_with(model, prompts[1])};
  const auto run = [&](int i) {
    const auto reason = sessions[i].generate({.max_tokens = 40, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                                             [&together, i](const Token& token) {
                                               together[i].push_back(token.id);
                                               return true;
                                             });
    if (!reason) together[i].clear();
  };
  std::thread second([&] { run(1); });
  run(0);
  second.join();
  CHECK(together[0] == alone[0]);
  CHECK(together[1] == alone[1]);
}

TEST_CASE("the same seed draws the same tokens, another seed others") {
  const Fixture fixture;
  const Model model = fixture.open();
  const auto draw = [&](uint64_t seed) {
    Session session = session_with(model, kPrompt);
    std::vector<int32_t> ids;
    const auto reason = session.generate({.max_tokens = 30,
                                          .sampling = {.temperature = 1, .top_k = 50, .top_p = 0.95f, .min_p = 0.01f,
                                                       .repeat_penalty = 1.1f, .seed = seed},
                                          .stop = {},
                                          .ignore_eos = true},
                                         [&](const Token& token) {
                                           ids.push_back(token.id);
                                           return true;
                                         });
    REQUIRE(reason);
    return ids;
  };
  CHECK(draw(5) == draw(5));
  CHECK(draw(5) != draw(6));
}
