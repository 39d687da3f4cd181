package engine

// This file makes calls of what a policy names, to compare its programs with OPA.

import (
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// sampleCalls makes n calls of the texts in src, the same ones each time.
func sampleCalls(src *program.Source, n int) []*policy.Input {
	w := words{source: []string{"spiffe://sample.test/any"}, path: []string{"/", "/sample/path"}, method: []string{"GET", "POST"}}
	for i := range src.Grants {
		w.grant(&src.Grants[i])
	}
	w.condition(src.Deny)
	w.condition(src.Allow)
	return w.calls([]string{src.Destination}, n, src.Generation, uint64(len(src.Grants)))
}

// SampleCalls makes n calls of the texts in the policies of engines, the same ones each
// time: of their grants, and of all that their own Rego has between quotes. They go to
// destinations in turn.
func SampleCalls(destinations []string, n int, engines ...*Engine) []*policy.Input {
	w := words{source: []string{"spiffe://sample.test/any"}, path: []string{"/", "/sample/path"}, method: []string{"GET", "POST"}}
	for _, e := range engines {
		for i := range e.grants {
			g := nativeGrant(&e.grants[i])
			w.grant(&g)
		}
		headers, queries, texts := e.texts()
		add(&w.headers, headers...)
		add(&w.queries, queries...)
		for _, text := range texts {
			w.text(text)
		}
	}
	return w.calls(destinations, n, uint64(n), uint64(len(destinations)))
}

// texts are what own Rego has between quotes, and the paths that its lists of them are;
// apart from these the names by which it reads headers and queries.
func (e *Engine) texts() (headers, queries, texts []string) {
	if !e.ownRego {
		return nil, nil, nil
	}
	for name, m := range e.program.compiler.Modules {
		if name == ModuleName {
			continue
		}
		ast.WalkTerms(m, func(t *ast.Term) bool {
			switch v := t.Value.(type) {
			case ast.String:
				texts = append(texts, string(v))
			case *ast.Array: // a path that is taken apart
				texts = append(texts, joined(v))
			case ast.Ref: // its parts are names of fields
				for i, part := range v[:len(v)-1] {
					key, _ := v[i+1].Value.(ast.String)
					switch field, _ := part.Value.(ast.String); field {
					case "headers", "headers_all":
						headers = append(headers, string(key))
					case "parsed_query":
						queries = append(queries, string(key))
					}
				}
				return true
			}
			return false
		})
	}
	for _, list := range []*[]string{&headers, &queries, &texts} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return headers, queries, texts
}

// joined is the path whose segments are those of list; what is no text is "1".
func joined(list *ast.Array) string {
	var path strings.Builder
	list.Foreach(func(t *ast.Term) {
		segment, ok := t.Value.(ast.String)
		if !ok {
			segment = "1"
		}
		path.WriteString("/" + string(segment))
	})
	return path.String()
}

// Named are the SPIFFE IDs that grants name alone as destinations or own Rego names at
// all, sorted.
func (e *Engine) Named() []string {
	ids := e.Destinations()
	_, _, texts := e.texts()
	for _, text := range texts {
		if strings.HasPrefix(text, "spiffe://") && strings.Count(text, "/") > 2 && !strings.HasSuffix(text, "/") {
			ids = append(ids, text)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// text takes in a text that could stand for anything.
func (w *words) text(s string) {
	add(&w.other, s)
	switch {
	case strings.HasPrefix(s, "spiffe://"):
		add(&w.source, s, strings.TrimSuffix(s, "/")+"/a")
	case strings.HasPrefix(s, "/"): // of a URL or of a SPIFFE ID
		add(&w.path, s, strings.TrimSuffix(s, "/")+"/a")
		add(&w.source, "spiffe://sample.test"+strings.TrimSuffix(s, "/"))
	case strings.ToUpper(s) == s:
		add(&w.method, s)
	default:
		add(&w.path, "/"+s, "/"+s+"/1")
		if strings.Contains(s, ".") && !strings.ContainsAny(s, " /") { // a trust domain, or a service
			add(&w.source, "spiffe://"+s+"/any")
			add(&w.path, "/"+s+"/Any")
		}
	}
}

// calls makes n calls of w, to destinations in turn.
func (w *words) calls(destinations []string, n int, seed1, seed2 uint64) []*policy.Input {
	r := rand.New(rand.NewPCG(seed1, seed2)) //nolint:gosec // a choice of samples
	one := func(of []string) string { return of[r.IntN(len(of))] }
	all := make([]*policy.Input, n)
	for i := range all {
		in := &policy.Input{
			Source: one(w.source), Destination: destinations[i%len(destinations)], Protocol: []policy.Protocol{policy.HTTP, policy.HTTP, policy.GRPC, policy.TCP}[r.IntN(4)],
			Method: one(w.method), Path: one(w.path), Host: one(append(w.other, "sample")),
		}
		headers := policy.HeaderMap{}
		in.Headers = headers
		for _, name := range w.headers {
			for range r.IntN(3) {
				headers[name] = append(headers[name], one(append(w.other, "sample")))
			}
		}
		for _, key := range w.queries {
			if r.IntN(2) == 0 {
				in.Query += "&" + key + "=" + one(append(w.other, "sample"))
			}
		}
		all[i] = in
	}
	return all
}

// words are the texts that a policy compares calls with, by what they could be.
type words struct{ source, path, method, headers, queries, other []string }

// maxWords bounds each kind; policies with more are sampled in part.
const maxWords = 1024

func add(to *[]string, words ...string) {
	for _, word := range words {
		if word != "" && len(*to) < maxWords {
			*to = append(*to, word)
		}
	}
}

func (w *words) grant(g *program.Grant) {
	for _, from := range g.From {
		add(&w.source, strings.Replace(from, "*", "a", 1))
	}
	add(&w.method, g.Methods...)
	for _, p := range g.Paths {
		path := p.Text
		if p.Parts != nil {
			path = "/" + strings.Join(sampleParts(p.Parts), "/")
		}
		add(&w.path, path)
		if p.More {
			add(&w.path, path+"/a")
		}
		if g.Protocol == policy.GRPC {
			for _, method := range append([]string{"Any"}, g.Methods...) {
				add(&w.path, "/"+p.Text+"/"+method)
			}
		}
	}
}

// sampleParts are segments that parts match.
func sampleParts(parts []program.Part) []string {
	segments := make([]string, len(parts))
	for i, part := range parts {
		if segments[i] = part.Text; part.Free {
			segments[i] = "1"
		}
	}
	return segments
}

func (w *words) condition(e *program.Expr) {
	if e == nil {
		return
	}
	for _, o := range []*program.Operand{&e.A, &e.B} {
		w.operand(o)
	}
	w.list(&e.List)
	add(&w.other, e.Set...)
	for _, text := range append(e.Set, e.B.Text, e.A.Text) {
		switch {
		case strings.HasPrefix(text, "spiffe://"):
			add(&w.source, text)
		case strings.HasPrefix(text, "/"):
			add(&w.path, text)
		case text != "" && strings.ToUpper(text) == text:
			add(&w.method, text)
		}
	}
	for i := range e.Of {
		w.condition(&e.Of[i])
	}
}

func (w *words) operand(o *program.Operand) {
	switch o.Field {
	case program.Text:
		add(&w.other, o.Text)
	case program.Header:
		add(&w.headers, o.Text)
	}
	if o.List != nil {
		w.list(o.List)
	}
}

func (w *words) list(l *program.List) {
	switch l.Kind {
	case program.HeaderValues:
		add(&w.headers, l.Key)
	case program.QueryValues:
		add(&w.queries, l.Key)
	}
	if l.Of != nil {
		w.operand(l.Of)
	}
}
