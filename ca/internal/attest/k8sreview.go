// TokenReview: the cluster's API server says whose a token is. Nothing of the
// token itself is read.

package attest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	reviewPath      = "/apis/authentication.k8s.io/v1/tokenreviews"
	maxReviewAnswer = 256 << 10
	// Anybody can have the CA ask the API server, so it asks only so often.
	reviewsPerSecond = 20
	reviewsBurst     = 200

	extraPrefix = "authentication.kubernetes.io/"
)

// TokenReview verifies tokens by asking the API server. Make it by
// NewTokenReview.
type TokenReview struct {
	server, audience, tokenFile string
	client                      *http.Client
	log                         *slog.Logger
	often                       *rate.Limiter
}

// NewTokenReview asks the API server at the URL server about tokens for audience,
// with the token in tokenFile, which is read each time.
func NewTokenReview(server, audience, tokenFile string, client *http.Client, log *slog.Logger) *TokenReview {
	return &TokenReview{
		server: strings.TrimSuffix(server, "/"), audience: audience, tokenFile: tokenFile, client: client, log: log,
		often: rate.NewLimiter(reviewsPerSecond, reviewsBurst),
	}
}

// tokenReview is the API's object, as far as it is used here.
type tokenReview struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		Token     string   `json:"token,omitempty"`
		Audiences []string `json:"audiences,omitempty"`
	} `json:"spec"`
	Status reviewStatus `json:"status"`
}

type reviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences,omitempty"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra,omitempty"`
	} `json:"user"`
}

// Pod implements TokenVerifier.
func (r *TokenReview) Pod(ctx context.Context, token string, _ time.Time) (Pod, error) {
	if !r.often.Allow() {
		return Pod{}, fmt.Errorf("%w: the API server is asked too often", ErrCannotVerify)
	}
	answer, err := r.ask(ctx, token)
	if err != nil {
		// What is wrong between the CA and the API server is nobody else's business.
		r.log.LogAttrs(ctx, slog.LevelWarn, "tokens of a Kubernetes cluster cannot be reviewed",
			slog.String("api_server", r.server), slog.Any("err", err))
		return Pod{}, ErrCannotVerify
	}
	return r.judge(answer.Status)
}

func (r *TokenReview) ask(ctx context.Context, token string) (*tokenReview, error) {
	own, err := os.ReadFile(r.tokenFile)
	if err != nil {
		return nil, err
	}
	review := tokenReview{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}
	review.Spec.Token, review.Spec.Audiences = token, []string{r.audience}
	body, err := json.Marshal(review)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.server+reviewPath, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(own)))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return nil, fmt.Errorf("post %s: status %d: see that the token in %s may create tokenreviews (role system:auth-delegator)", reviewPath, resp.StatusCode, r.tokenFile)
	}
	return readReview(resp.Body)
}

func readReview(body io.Reader) (*tokenReview, error) {
	data, err := io.ReadAll(io.LimitReader(body, maxReviewAnswer+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxReviewAnswer {
		return nil, fmt.Errorf("the answer has more than %d bytes", maxReviewAnswer)
	}
	var answer tokenReview
	if err := json.Unmarshal(data, &answer); err != nil || answer.Kind != "TokenReview" {
		return nil, errors.New("the answer is no TokenReview")
	}
	return &answer, nil
}

func (r *TokenReview) judge(s reviewStatus) (Pod, error) {
	if !s.Authenticated {
		return Pod{}, errors.New("its API server does not know it: it has expired, is for another audience, or of another cluster")
	}
	// A server that knows of no audiences leaves them out.
	if !slices.Contains(s.Audiences, r.audience) {
		return Pod{}, fmt.Errorf("it is not meant for %q", r.audience)
	}
	namespace, name, ok := account(s.User.Username)
	if !ok {
		return Pod{}, errors.New("it is not that of a service account")
	}
	extra := func(key string) string {
		if values := s.User.Extra[extraPrefix+key]; len(values) == 1 {
			return values[0]
		}
		return ""
	}
	return Pod{
		Namespace: namespace, Account: name, Name: extra("pod-name"), UID: extra("pod-uid"),
		Node: extra("node-name"), NodeUID: extra("node-uid"),
	}, nil
}
