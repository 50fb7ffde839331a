-- What the loop demo changed: each policy on the held-out prompts and on the labelled pairs.
--   spark-sql --properties-file conf/cluster/local.conf --hivevar warehouse=FULL_PATH \
--     --hivevar pairs=loop-pairs -f conf/demo/loop.sql
SET spark.sql.cli.print.header=true;
WITH held_out AS (
  SELECT split_part(completion_id, '/', 1) AS policy, reward_name, reward, num_tokens, finish_reason
  FROM delta.`${hivevar:warehouse}/rewards`
  WHERE dataset = 'loop-held-out' AND status = 'ok'
),
sampled AS (
  SELECT policy, count_if(reward_name = 'loop-plain') AS samples,
         round(avg(reward) FILTER (WHERE reward_name = 'loop-plain'), 2) AS plain_reward,
         round(avg(reward) FILTER (WHERE reward_name = 'loop-adaptive'), 2) AS adaptive_reward,
         round(avg(num_tokens), 1) AS tokens,
         round(avg(CASE WHEN finish_reason = 'length' THEN 1.0 ELSE 0.0 END), 2) AS cut
  FROM held_out
  GROUP BY policy
),
labelled AS (
  SELECT reward_name AS policy, count(*) AS pairs, count_if(outcome = 'win') AS `right`
  FROM delta.`${hivevar:warehouse}/benchmark_pairs`
  WHERE dataset = '${hivevar:pairs}' AND status = 'ok'
  GROUP BY reward_name
)
SELECT policy, samples, plain_reward, adaptive_reward, tokens, cut, `right`, pairs,
       round(`right` / pairs, 3) AS accuracy
FROM sampled LEFT JOIN labelled USING (policy)
ORDER BY policy = 'start' DESC, policy DESC;
