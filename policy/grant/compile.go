package grant

// This file decides the form in which grants travel in a policy bundle: JSON
// data, keyed by destination, then source, then protocol, so that a decision
// costs the same with ten grants and with ten thousand. The Rego module of
// policy/engine reads "index" and "depths"; "grants" keeps what was written,
// for explanations, and is what the index is made from and checked against.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
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
		compiled := g.compile()
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

// compile is what matching needs: "any" path or "exact" ones, prefixes
// "below" which more must follow, and "templates"; "methods"; "expires_ns".
func (g *Grant) compile() map[string]any {
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

// toData is g as written, without its ID, which is its key.
func (g *Grant) toData() map[string]any {
	d := map[string]any{}
	put := func(m map[string]any, key string, items []string) {
		if items != nil {
			m[key] = list(items)
		}
	}
	put(d, "from", g.From)
	put(d, "to", g.To)
	protocol := map[string]any{}
	d[string(g.Protocol())] = protocol
	if g.HTTP != nil {
		put(protocol, "methods", g.HTTP.Methods)
		put(protocol, "paths", g.HTTP.Paths)
	}
	if g.GRPC != nil {
		put(protocol, "services", g.GRPC.Services)
		put(protocol, "methods", g.GRPC.Methods)
	}
	for key, value := range map[string]string{"effect": string(g.Effect), "mode": string(g.Mode), "owner": g.Owner} {
		if value != "" {
			d[key] = value
		}
	}
	if g.Expires != nil {
		d["expires"] = g.Expires.UTC().Format(time.RFC3339Nano)
	}
	return d
}

// dataGrant is the JSON form that toData makes.
type dataGrant struct {
	From    []string   `json:"from"`
	To      []string   `json:"to"`
	HTTP    *dataHTTP  `json:"http"`
	GRPC    *dataGRPC  `json:"grpc"`
	TCP     *struct{}  `json:"tcp"`
	Effect  Effect     `json:"effect"`
	Mode    Mode       `json:"mode"`
	Owner   string     `json:"owner"`
	Expires *time.Time `json:"expires"`
}

type dataHTTP struct {
	Methods []string `json:"methods"`
	Paths   []string `json:"paths"`
}

type dataGRPC struct {
	Services []string `json:"services"`
	Methods  []string `json:"methods"`
}

// FromData reads back the grants in a document that Compile made, sorted by
// ID, and checks them as Parse does.
func FromData(data map[string]any) ([]Grant, error) {
	written, ok := data["grants"].(map[string]any)
	if !ok {
		return nil, errors.New("policy data has no grants")
	}
	grants := make([]Grant, 0, len(written))
	for id, v := range written {
		g, err := fromData(id, v)
		if err != nil {
			return nil, err
		}
		grants = append(grants, g)
	}
	slices.SortFunc(grants, func(a, b Grant) int { return strings.Compare(a.ID, b.ID) })
	return grants, Check(grants)
}

// CheckData refuses a document unless its index is exactly the one that
// Compile makes of its grants: nothing may decide that is not written.
func CheckData(data map[string]any) error {
	grants, err := FromData(data)
	if err != nil {
		return err
	}
	want, err := json.Marshal(Compile(grants))
	if err != nil {
		return err
	}
	got, err := json.Marshal(data)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("policy data was not made from its grants: build the policy bundle again with this version of merlon")
	}
	return nil
}

func fromData(id string, v any) (Grant, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return Grant{}, err
	}
	var d dataGrant
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return Grant{}, fmt.Errorf("grant %q in policy data: %v", id, err)
	}
	g := Grant{
		ID: id, From: d.From, To: d.To, Effect: d.Effect, Mode: d.Mode, Owner: d.Owner, Expires: d.Expires,
		File: "policy data",
	}
	if d.HTTP != nil {
		g.HTTP = &HTTP{Methods: d.HTTP.Methods, Paths: d.HTTP.Paths}
	}
	if d.GRPC != nil {
		g.GRPC = &GRPC{Services: d.GRPC.Services, Methods: d.GRPC.Methods}
	}
	if d.TCP != nil {
		g.TCP = &TCP{}
	}
	return g, nil
}
