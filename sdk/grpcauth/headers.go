// The metadata of a call, as policies and handlers see it.

package grpcauth

import (
	"context"
	"encoding/base64"
	"iter"
	"maps"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/metadata"

	"merlon.dev/policy"
)

// headers puts the metadata into in, and takes out of ctx what claims an
// identity; only TLS says who the caller is (T13).
func headers(ctx context.Context, in *policy.Input) context.Context {
	md, host := received(ctx)
	if md == nil {
		return ctx
	}
	in.Host = host
	for name := range md {
		if policy.ClaimsIdentity(name) {
			md = maps.Clone(md) // the values stay as they are
			maps.DeleteFunc(md, func(name string, _ []string) bool { return policy.ClaimsIdentity(name) })
			ctx = metadata.NewIncomingContext(ctx, md)
			break
		}
	}
	in.Headers = sent(md)
	return ctx
}

// received is the metadata of a call, which must not be changed, and its :authority.
//
// Package metadata hands out copies only, of all values, of which a policy mostly
// reads none. So it is asked for one value, and watch sees where that comes from.
func received(ctx context.Context) (md metadata.MD, host string) {
	w := watch{Context: ctx}
	if values := metadata.ValueFromIncomingContext(&w, ":authority"); len(values) > 0 {
		host = values[0]
	}
	if w.md == nil {
		w.md, _ = metadata.FromIncomingContext(ctx)
	}
	for name := range w.md {
		if strings.ToLower(name) != name { // gRPC's own is; an interceptor's may not be
			w.md, _ = metadata.FromIncomingContext(ctx)
			break
		}
	}
	return w.md, host
}

// watch is a context that remembers the metadata that somebody finds in it.
type watch struct {
	context.Context
	md metadata.MD
}

// Value implements context.Context.
func (w *watch) Value(key any) any {
	v := w.Context.Value(key)
	if md, ok := v.(metadata.MD); ok {
		w.md = md
	}
	return v
}

// sent is metadata as it travels. Names are in lower case.
type sent metadata.MD

// Values implements policy.Headers.
func (s sent) Values(name string) ([]string, bool) {
	values, ok := s[name]
	switch {
	case !ok || strings.HasPrefix(name, ":"):
		return nil, false
	case strings.HasSuffix(name, "-bin"):
		return onTheWire(values), true
	}
	return values, true
}

// All implements policy.Headers.
func (s sent) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		for name := range s {
			if values, ok := s.Values(name); ok && !yield(name, values) {
				return
			}
		}
	}
}

// UTF8 implements policy.Headers. As they travel, binary values are.
func (s sent) UTF8() bool {
	for name, values := range s {
		switch {
		case strings.HasPrefix(name, ":"):
		case !utf8.ValidString(name), !strings.HasSuffix(name, "-bin") && !policy.AllUTF8(values):
			return false
		}
	}
	return true
}

// onTheWire encodes binary metadata again, as it travels.
func onTheWire(values []string) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = base64.RawStdEncoding.EncodeToString([]byte(v))
	}
	return out
}
