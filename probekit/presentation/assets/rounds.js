// Rounds of speculative decoding, from the trace of the model's own text.
//
// A round that starts at output index i, with draft length K, budget M and N tokens in the text, drafts
// k = min(K, M - i - 1) tokens, accepts the run of agreements from i (at most k, at most N - i), and emits one more
// token, the model's own, unless the text ended.

/** Output index at which the first round starts. */
export const FIRST_START = { prefill: 1, draft: 0 };

/** The rounds of one greedy text. `agrees`: one flag an output token. */
export function roundsOf(agrees, draftLength, budget, firstRound) {
  const tokens = agrees.length;
  const rounds = [];
  let start = FIRST_START[firstRound];
  while (start < tokens) {
    const drafted = Math.min(draftLength, budget - start - 1);
    const reach = Math.min(drafted, tokens - start);
    let accepted = 0;
    while (accepted < reach && agrees[start + accepted]) accepted += 1;
    const emitted = Math.min(accepted + 1, tokens - start);
    rounds.push({ start, drafted, accepted, emitted, rejected: accepted < reach });
    start += emitted;
  }
  return rounds;
}

/**
 * The rounds of one greedy text by any way of drafting, which start behind the prefill's token. `packed`: five numbers a
 * round: how many drafts one after the other (of a tree, levels), tokens drafted, accepted, who drafted (from 1; 0:
 * nobody), and the first rejected draft (1 more than its place among token texts; 0: none, or not known).
 */
export function roundsOfWay(packed, tokens) {
  const rounds = [];
  let start = FIRST_START.prefill;
  for (let at = 0; at < packed.length; at += 5) {
    const [length, drafted, accepted, who, wrong] = packed.slice(at, at + 5);
    const emitted = Math.min(accepted + 1, tokens - start);
    const rejected = accepted < Math.min(length, tokens - start) && emitted > accepted;
    rounds.push({ start, drafted, accepted, emitted, rejected, who: who - 1, wrong: wrong - 1 });
    start += emitted;
  }
  return rounds;
}

/** Counts of rounds that are known. */
export function countsOfRounds(rounds, seconds) {
  const counts = { ...noCounts(Math.max(0, ...rounds.map((round) => round.drafted))), texts: 1, seconds };
  for (const round of rounds) {
    counts.tokens += round.emitted;
    counts.accepted += round.accepted;
    counts.rejections += round.rejected ? 1 : 0;
    counts.byDrafted[round.drafted] += 1;
  }
  return counts;
}

/** Counts of no text; `byDrafted[k]` is the number of rounds that draft k tokens. */
export function noCounts(draftLength) {
  return { texts: 0, tokens: 0, accepted: 0, rejections: 0, byDrafted: new Float64Array(draftLength + 1) };
}

/** Counts of one greedy text. */
export function countsOf(agrees, draftLength, budget, firstRound) {
  const counts = noCounts(draftLength);
  counts.texts = 1;
  counts.tokens = Math.max(0, agrees.length - FIRST_START[firstRound]);
  for (const round of roundsOf(agrees, draftLength, budget, firstRound)) {
    counts.accepted += round.accepted;
    counts.rejections += round.rejected ? 1 : 0;
    counts.byDrafted[round.drafted] += 1;
  }
  return counts;
}

/**
 * Expected counts of one sampled text, exactly, by a recursion over the chance that a round starts at each index.
 * `chance[t]` is w[t] = min(1, q/p), the chance that token t is accepted if it was drafted. `starts` comes back too.
 */
export function expectedCountsOf(chance, draftLength, budget, firstRound) {
  const tokens = chance.length;
  const first = FIRST_START[firstRound];
  const counts = noCounts(draftLength);
  counts.texts = 1;
  counts.tokens = Math.max(0, tokens - first);
  const starts = new Float64Array(tokens + 2);
  starts[first] = 1;
  for (let start = first; start < tokens; start += 1) {
    const drafted = Math.min(draftLength, budget - start - 1);
    const reach = Math.min(drafted, tokens - start);
    counts.byDrafted[drafted] += starts[start];
    let live = starts[start];
    for (let step = 0; step < reach; step += 1) {
      const kept = live * chance[start + step];
      counts.accepted += kept;
      counts.rejections += live - kept;
      starts[start + step + 1] += live - kept;
      live = kept;
    }
    starts[start + reach + 1] += live; // all were accepted: the model adds a token, or the text has ended
  }
  return { ...counts, starts: starts.subarray(0, tokens) };
}

export function pooled(all, draftLength) {
  const sum = noCounts(draftLength);
  if (all.every((counts) => counts.seconds !== undefined)) sum.seconds = all.reduce((total, { seconds }) => total + seconds, 0);
  for (const counts of all) {
    for (const name of ["texts", "tokens", "accepted", "rejections"]) sum[name] += counts[name];
    counts.byDrafted.forEach((rounds, drafted) => (sum.byDrafted[drafted] += rounds));
  }
  return sum;
}

/**
 * What follows from counts; null where a figure is not defined.
 * `costs`: { autoregressive: seconds a step, rounds: seconds of a round with 0, 1, ... drafts }, or null. Counts whose
 * `seconds` are known need the first only.
 */
export function figuresOf(counts, costs) {
  let rounds = 0;
  let drafted = 0;
  let seconds = counts.seconds ?? (costs ? 0 : NaN);
  counts.byDrafted.forEach((many, length) => {
    rounds += many;
    drafted += many * length;
    if (many && counts.seconds === undefined) seconds += many * (costs?.rounds[length] ?? NaN);
  });
  const trials = counts.accepted + counts.rejections;
  return {
    texts: counts.texts,
    rounds,
    drafted,
    accepted: counts.accepted,
    tokens: counts.tokens,
    acceptanceRate: drafted ? counts.accepted / drafted : null,
    alpha: trials ? counts.accepted / trials : null,
    tokensPerRound: rounds ? counts.tokens / rounds : null,
    speedup: seconds > 0 ? (counts.tokens * costs.autoregressive) / seconds : null,
  };
}
