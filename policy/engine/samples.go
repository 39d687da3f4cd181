package engine

// This file makes calls of what a policy names, to compare its programs with OPA.

import (
	"math/rand/v2"
	"strings"

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
	r := rand.New(rand.NewPCG(src.Generation, uint64(len(src.Grants)))) //nolint:gosec // a choice of samples
	one := func(of []string) string { return of[r.IntN(len(of))] }
	all := make([]*policy.Input, n)
	for i := range all {
		in := &policy.Input{
			Source: one(w.source), Destination: src.Destination, Protocol: []policy.Protocol{policy.HTTP, policy.HTTP, policy.GRPC, policy.TCP}[r.IntN(4)],
			Method: one(w.method), Path: one(w.path), Host: one(append(w.other, "sample")), Headers: map[string][]string{},
		}
		for _, name := range w.headers {
			for range r.IntN(3) {
				in.Headers[name] = append(in.Headers[name], one(append(w.other, "sample")))
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
