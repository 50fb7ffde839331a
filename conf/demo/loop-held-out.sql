-- The loop demo's held-out completions of all policies in one table, each named after its policy.
CREATE OR REPLACE TABLE delta.`${hivevar:warehouse}/samples/loop-held-out` USING delta AS
SELECT prompt_id, domain, prompt, 'start/' || completion_id AS completion_id, completion, finish_reason
FROM delta.`${hivevar:warehouse}/samples/loop-held-out-start`
UNION ALL
SELECT prompt_id, domain, prompt, 'plain/' || completion_id, completion, finish_reason
FROM delta.`${hivevar:warehouse}/samples/loop-held-out-plain`
UNION ALL
SELECT prompt_id, domain, prompt, 'adaptive/' || completion_id, completion, finish_reason
FROM delta.`${hivevar:warehouse}/samples/loop-held-out-adaptive`;
