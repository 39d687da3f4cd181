package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

func mustParse(t testing.TB, yaml string) []grant.Grant {
	t.Helper()
	if yaml == "" {
		return nil
	}
	g, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte(yaml)}})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func open(t testing.TB, grants []grant.Grant, modules map[string]string) *Engine {
	t.Helper()
	e, err := New(context.Background(), Source{Modules: modules, Data: map[string]any{"merlon": grant.Compile(grants)}, Generation: 7})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func benchmarkGrants(n int) []grant.Grant {
	grants := make([]grant.Grant, n)
	for i := range grants {
		grants[i] = grant.Grant{
			ID: fmt.Sprintf("grant-%d", i), From: []string{fmt.Sprintf("spiffe://shop.test/web-%d", i)},
			To:   []string{fmt.Sprintf("spiffe://shop.test/orders-%d", i%100)},
			HTTP: &grant.HTTP{Methods: []string{"GET"}, Paths: []string{"/orders", "/orders/*"}},
		}
	}
	return grants
}

func BenchmarkAuthorize(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		e := open(b, benchmarkGrants(n), nil)
		for name, method := range map[string]string{"allow": "GET", "deny": "POST"} {
			b.Run(fmt.Sprintf("grants=%d/%s", n, name), func(b *testing.B) {
				ctx, i := context.Background(), 0
				inputs := make([]*policy.Input, 4096)
				for i := range inputs {
					inputs[i] = &policy.Input{
						Source: fmt.Sprintf("spiffe://shop.test/web-%d", i%n), Destination: fmt.Sprintf("spiffe://shop.test/orders-%d", i%n%100),
						Protocol: policy.HTTP, Method: method, Path: fmt.Sprintf("/orders/%d", i),
					}
				}
				b.ReportAllocs()
				for b.Loop() {
					if d := e.Authorize(ctx, inputs[i%len(inputs)]); d.Allow != (method == "GET") {
						b.Fatal(d)
					}
					i++
				}
			})
		}
	}
}

var _ = json.Marshal
