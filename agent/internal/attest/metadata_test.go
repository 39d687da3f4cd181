// Instance tokens, from a served metadata server.

package attest

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"merlon.dev/ca/capb"
)

// gcpServer answers as Google's metadata server does, with a token that says what
// was asked for.
func gcpServer(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata-Flavor") != "Google" || r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	w.Header().Set("Metadata-Flavor", "Google")
	fmt.Fprintf(w, "token.for.%s.%s", r.URL.Query().Get("audience"), r.URL.Query().Get("format"))
}

func azureServer(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata") != "true" || r.URL.Path != "/metadata/identity/oauth2/token" || r.URL.Query().Get("api-version") == "" {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, `{"access_token":"token.for.%s","expires_in":"86399","token_type":"Bearer"}`, r.URL.Query().Get("resource"))
}

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestInstanceTokenIsAskedForWithTheAudience(t *testing.T) {
	for want, a := range map[string]Attestor{
		"token.for.https://ca.test.full": &GCP{Audience: "https://ca.test", Server: serve(t, gcpServer)},
		"token.for.api://ca.test":        &Azure{Audience: "api://ca.test", Server: serve(t, azureServer)},
	} {
		req := &capb.AttestRequest{}
		if err := a.Evidence(t.Context(), tls.ConnectionState{}, req); err != nil || req.GetGcpToken()+req.GetAzureToken() != want {
			t.Errorf("%s: evidence %v, %v; want %s", a.Kind(), req, err, want)
		}
	}
}

func TestMetadataServersThatAnswerNoToken(t *testing.T) {
	answer := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			fmt.Fprint(w, body)
		}
	}
	google := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			fmt.Fprint(w, body)
		}
	}
	large := strings.Repeat("x", maxMetadataAnswer+1)
	for name, a := range map[string]Attestor{
		"nobody":                    &GCP{Server: "http://127.0.0.1:1"},
		"an error":                  &GCP{Server: serve(t, answer(404, "no service account"))},
		"a portal that answers all": &GCP{Server: serve(t, answer(200, "<html>"))},
		"too much":                  &GCP{Server: serve(t, google(large))},
		"a redirect":                &GCP{Server: serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusFound) })},
		"Azure: nobody":             &Azure{Server: "http://127.0.0.1:1"},
		"Azure: an error":           &Azure{Server: serve(t, answer(400, `{"error":"invalid_request"}`))},
		"Azure: no JSON":            &Azure{Server: serve(t, answer(200, "x"))},
		"Azure: no token":           &Azure{Server: serve(t, answer(200, "{}"))},
		"Azure: too much":           &Azure{Server: serve(t, answer(200, `{"access_token":"`+large+`"}`))},
	} {
		req := &capb.AttestRequest{}
		if err := a.Evidence(t.Context(), tls.ConnectionState{}, req); err == nil || req.GetEvidence() != nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("%s: evidence %v, %v; want an error that says what was asked for", name, req.GetEvidence(), err)
		}
	}
}
