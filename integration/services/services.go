// Package services is what tests of services share: an identity by the SDK, a server
// that asks the policy about each request, and what a caller is answered.
package services

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// Open opens the SDK as what this process is to the agent of d.
func Open(tb testing.TB, d *stage.Domain, opts ...sdk.Option) *sdk.Identity {
	tb.Helper()
	id, err := sdk.Open(tb.Context(), append([]sdk.Option{sdk.WithAgentAddress(d.WorkloadAPI)}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(id.Close)
	return id
}

// Serve serves handler on a free port, to whom the policy allows it, and returns the URL.
func Serve(tb testing.TB, id *sdk.Identity, handler http.Handler) string {
	tb.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(id, handler), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 5 * time.Second}
	go srv.ServeTLS(lis, "", "")
	tb.Cleanup(func() { srv.Close() })
	return "https://" + lis.Addr().String()
}

// OK answers ok.
func OK(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }

// Reason is the reason of a denied GET, its error, or its status.
func Reason(c *http.Client, url string) string {
	resp, err := c.Get(url)
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		return string(denied.Reason)
	}
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	return resp.Status
}

// WantReason waits until Reason of a GET is reason.
func WantReason(tb testing.TB, what string, c *http.Client, url, reason string) {
	tb.Helper()
	stage.Eventually(tb, what, func() error {
		if got := Reason(c, url); got != reason {
			return fmt.Errorf("%s is answered %q; want %q", url, got, reason)
		}
		return nil
	})
}

// Get is what a GET of url by a program that knows nothing of Merlon is answered: status
// and body, over a connection of its own.
func Get(url string) (string, error) {
	c := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return fmt.Sprint(res.StatusCode, " ", string(text)), err
}

// Wants says whether Get of url has want in it.
func Wants(url, want string) error {
	got, err := Get(url)
	if err == nil && !strings.Contains(got, want) {
		err = fmt.Errorf("%q; want %q", got, want)
	}
	return err
}

// Source is go-spiffe's source of what this process is to the agent of d.
func Source(tb testing.TB, d *stage.Domain) *workloadapi.X509Source {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), 20*time.Second)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(d.WorkloadAPI)))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}
