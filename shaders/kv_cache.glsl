// SPDX-License-Identifier: Apache-2.0
// The KV cache, FP16:
//   block    [layers][kv_heads][K, V][64 positions][head_dim]
//   table    [sessions][blocks_per_session]   number of the physical block, behind the rows of the pass
// kHeadDim is even, so that two halves are one word.
const uint kBlockPositions = 64;

// A block may lie beyond 4 GiB: the address is added up in 64 bits without needing them in the shader.
Words kv_rows(Words cache, Words table, uint table_start, uint session, uint blocks_per_session, uint position,
              uint layer, uint layers, uint head, uint heads, bool value) {
  const uint block = table.at[table_start + session * blocks_per_session + position / kBlockPositions];
  const uint part_bytes = kBlockPositions * kHeadDim * 2;
  uint high, low;
  umulExtended(block, layers * heads * 2 * part_bytes, high, low);
  const uint inner = ((layer * heads + head) * 2 + (value ? 1u : 0u)) * part_bytes +
                     position % kBlockPositions * kHeadDim * 2;
  uvec2 address = uvec2(cache);
  uint carry, carry_inner;
  address.x = uaddCarry(address.x, low, carry);
  address.x = uaddCarry(address.x, inner, carry_inner);
  address.y += high + carry + carry_inner;
  return Words(address);
}
