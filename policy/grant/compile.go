package grant

// This file decides the form in which grants travel in a policy bundle: JSON
// data, keyed by destination, then source, then protocol, so that a decision
// costs the same with ten grants and with ten thousand. The Rego module of
// policy/engine reads "index" and "depths"; "grants" keeps what was written,
// for explanations, and is what the index is made from and checked against.

import (
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"merlon.dev/policy"
)

// Compile returns the data document of grants, which have passed Check:
//
//	grants: {ID: grant as written}
//	index:  {to: {from: {protocol: {allow|deny|dry_run: [compiled grant]}}}}
//	depths: {to|from: [number of "/"-separated parts of "…/*" patterns]}
//
// where to and from are a pattern as written, or "*" for any. The values are
// of the types that encoding/json yields with UseNumber.
func Compile(grants []Grant) map[string]any {
	written := make(map[string]any, len(grants))
	index := map[string]any{}
	depths := map[string]map[int]bool{"to": {}, "from": {}}
	sorted := slices.Clone(grants)
	slices.SortFunc(sorted, func(a, b Grant) int { return strings.Compare(a.ID, b.ID) })
	for i := range sorted {
		g := &sorted[i]
		written[g.ID] = g.toData()
		compiled := g.Compiled()
		for _, to := range keys(g.To, depths["to"]) {
			for _, from := range keys(g.From, depths["from"]) {
				leaf := child(child(child(index, to), from), string(g.Protocol()))
				list, _ := leaf[g.kind()].([]any)
				leaf[g.kind()] = append(list, compiled)
			}
		}
	}
	return map[string]any{
		"grants": written,
		"index":  index,
		"depths": map[string]any{"to": numbers(depths["to"]), "from": numbers(depths["from"])},
	}
}

func child(m map[string]any, key string) map[string]any {
	c, ok := m[key].(map[string]any)
	if !ok {
		c = map[string]any{}
		m[key] = c
	}
	return c
}

// keys are the index keys of patterns; the depths of "…/*" ones are noted.
func keys(patterns []string, depths map[int]bool) []string {
	if patterns == nil {
		return []string{"*"}
	}
	for _, p := range patterns {
		if base, ok := strings.CutSuffix(p, "/*"); ok {
			depths[strings.Count(base, "/")+1] = true
		}
	}
	return patterns
}

func numbers(set map[int]bool) []any {
	sorted := make([]int, 0, len(set))
	for n := range set {
		sorted = append(sorted, n)
	}
	slices.Sort(sorted)
	out := make([]any, len(sorted))
	for i, n := range sorted {
		out[i] = json.Number(strconv.Itoa(n))
	}
	return out
}

// kind is the list of an index leaf that g belongs to.
func (g *Grant) kind() string {
	switch {
	case g.Mode == DryRun:
		return "dry_run"
	case g.Effect == Deny:
		return "deny"
	default:
		return "allow"
	}
}

// Compiled is what matching needs, as Compile has it: "any" path or "exact" ones, prefixes
// "below" which more must follow, and "templates"; "methods"; "expires_ns".
func (g *Grant) Compiled() map[string]any {
	c := map[string]any{"id": g.ID}
	if g.Expires != nil {
		c["expires_ns"] = json.Number(strconv.FormatInt(UnixNano(*g.Expires), 10))
	}
	if m := g.methods(); m != nil {
		c["methods"] = set(m)
	}
	if g.paths() == nil {
		c["any"] = true
		return c
	}
	var exact []string
	var below, templates []any
	for _, p := range g.paths() {
		base, prefix := strings.CutSuffix(p, "/*")
		switch {
		case g.HTTP != nil && strings.Contains(p, "{"):
			templates = append(templates, template(base, prefix))
		case g.HTTP != nil && prefix:
			below = append(below, policy.DecodePath(base)+"/")
		case g.HTTP != nil:
			exact = append(exact, policy.DecodePath(p))
		default:
			exact = append(exact, p)
		}
	}
	if exact != nil {
		c["exact"] = set(exact)
	}
	if below != nil {
		c["below"] = below
	}
	if templates != nil {
		c["templates"] = templates
	}
	return c
}

// UnixNano is t.UnixNano, which means nothing beyond the years 1678 to 2262:
// who writes the year 9999 means never, and not 1816.
func UnixNano(t time.Time) int64 {
	switch {
	case t.Before(time.Unix(0, math.MinInt64)):
		return math.MinInt64
	case t.After(time.Unix(0, math.MaxInt64)):
		return math.MaxInt64
	}
	return t.UnixNano()
}

// template is {parts: number of "/"-separated parts, more: whether more must
// follow, fixed: [[part, text]], free: [part]}.
func template(base string, more bool) map[string]any {
	var fixed, free []any
	parts := strings.Split(base, "/")
	for i, p := range parts {
		n := json.Number(strconv.Itoa(i))
		if strings.HasPrefix(p, "{") {
			free = append(free, n)
		} else if i > 0 {
			fixed = append(fixed, []any{n, policy.DecodePath(p)})
		}
	}
	return map[string]any{"parts": json.Number(strconv.Itoa(len(parts))), "more": more, "fixed": orEmpty(fixed), "free": orEmpty(free)}
}

func orEmpty(list []any) []any {
	if list == nil {
		return []any{}
	}
	return list
}

func set(items []string) map[string]any {
	m := make(map[string]any, len(items))
	for _, s := range items {
		m[s] = true
	}
	return m
}

func list(items []string) []any {
	out := make([]any, len(items))
	for i, s := range items {
		out[i] = s
	}
	return out
}
