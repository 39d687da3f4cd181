// Metadata as policies see it: the same as when every call's was copied.

package grpcauth

import (
	"context"
	"encoding/base64"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

// copied is what a policy is to see of md, and the host, said plainly.
func copied(md metadata.MD) (seen map[string][]string, host string) {
	seen = map[string][]string{}
	for name, values := range md {
		switch {
		case policy.ClaimsIdentity(name):
		case name == ":authority":
			if len(values) > 0 {
				host = values[0]
			}
		case strings.HasPrefix(name, ":"):
		case strings.HasSuffix(name, "-bin"):
			seen[name] = []string{}
			for _, v := range values {
				seen[name] = append(seen[name], base64.RawStdEncoding.EncodeToString([]byte(v)))
			}
		default:
			seen[name] = values
		}
	}
	return seen, host
}

func TestPolicySeesMetadataAsItWasSent(t *testing.T) {
	names := []string{
		":authority", ":path", "x-a", "x-b", "x-a-bin", "-bin", "", "x-spiffe-id", "x_spiffe_id", "x-forwarded-client-cert", "x-forwarded_client-cert",
		"X-Upper", "X-Spiffe-Id", "X-Upper-Bin", "content-type",
	}
	rapid.Check(t, func(t *rapid.T) {
		// In any case of letters: an interceptor in front may have put it there.
		raw := metadata.MD(rapid.MapOf(rapid.SampledFrom(names), rapid.SliceOfN(rapid.SampledFrom([]string{"", "1", "a,b", "1", "\xff\x00"}), 0, 3)).Draw(t, "metadata"))
		before := raw.Copy()
		ctx := metadata.NewIncomingContext(context.Background(), raw)
		md, _ := metadata.FromIncomingContext(ctx)
		want, host := copied(md)

		in := &policy.Input{}
		after := headers(ctx, in)
		if in.Host != host {
			t.Errorf("host %q; want %q", in.Host, host)
		}
		if got := map[string][]string(in.HeaderMap()); !maps.EqualFunc(got, want, slices.Equal) {
			t.Fatalf("all: %q; want %q", got, want)
		}
		for _, name := range append(names, "x-upper", "x-upper-bin", "x-none") {
			values, present := want[name]
			if got, ok := in.Header(name); ok != present || !slices.Equal(got, values) {
				t.Fatalf("%s: %q, %v; want %q, %v", name, got, ok, values, present)
			}
		}
		if in.Headers.UTF8() != policy.HeaderMap(want).UTF8() {
			t.Fatalf("UTF-8: %v", in.Headers.UTF8())
		}
		// The handler sees all but what claims an identity.
		maps.DeleteFunc(md, func(name string, _ []string) bool { return policy.ClaimsIdentity(name) })
		if handed, _ := metadata.FromIncomingContext(after); !maps.EqualFunc(handed, md, slices.Equal) {
			t.Fatalf("the handler sees %q; want %q", handed, md)
		}
		if !reflect.DeepEqual(raw, before) {
			t.Fatalf("the metadata was changed from %q to %q", before, raw)
		}
	})
}

func TestNoMetadata(t *testing.T) {
	in := &policy.Input{}
	if ctx := headers(t.Context(), in); ctx != t.Context() || in.Headers != nil || in.Host != "" {
		t.Errorf("%+v", in)
	}
}

// To read a call's metadata costs two small allocations, however much there is.
func TestUnreadMetadataIsNotCopied(t *testing.T) {
	md := metadata.Pairs(":authority", "orders", "content-type", "application/grpc", "x-a", "1", "x-b", "2", "x-c-bin", "3")
	ctx := metadata.NewIncomingContext(t.Context(), md)
	in := &policy.Input{}
	if n := testing.AllocsPerRun(100, func() { headers(ctx, in) }); n > 2 {
		t.Errorf("%v allocations", n)
	}
	if _, ok := in.Header("x-c-bin"); !ok {
		t.Error("it cannot be read")
	}
}
